"""Texts to tokens in several processes, in the order of the source whatever the number of processes.

One process reads and writes, the others parse and encode. So nothing that is written depends on who encoded it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from pretrain.data.prepare.backends import SAMPLE_CHARACTERS, choose_backend, open_backend, reraise_interrupts
from pretrain.data.prepare.workers import map_in_order
from pretrain.data.text.blocks import Block, texts_of
from pretrain.data.text.documents import cut_long
from pretrain.data.text.faults import Tally
from pretrain.data.text.sources import Source

UNIT_BYTES = 1 << 21
UNIT_BLOCKS = 4096  # of tiny files
SPLITS = ("train", "val", "held_out")


@dataclass(frozen=True)
class Unit:
    """A bounded run of blocks, and how far the source was after the last of them."""

    blocks: list[Block]
    cursor: object
    read_bytes: int

    @property
    def place(self) -> str:
        """Where it is, for people."""
        places = list(dict.fromkeys(block.place for block in self.blocks))
        return " to ".join(dict.fromkeys((places[0], places[-1])))


@dataclass
class Encoded:
    """The documents of a unit that belong to one split.

    tokens: each document and its separator, after what begins it, in the shards' dtype; ends: where each document ends
    in them, int64; text_bytes: the size of each document as UTF-8, int64; files: the number of the source file each came
    from, int32.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray
    files: np.ndarray

    def up_to(self, tokens: int) -> Encoded:
        """The first documents, the last of which reaches `tokens`."""
        documents = int(np.searchsorted(self.ends, tokens)) + 1
        if documents >= len(self.ends):
            return self
        return Encoded(
            self.tokens[: self.ends[documents - 1]],
            self.ends[:documents],
            self.text_bytes[:documents],
            self.files[:documents],
        )


@dataclass(frozen=True)
class Encoder:
    """What a process needs to turn blocks into tokens; small enough to be sent to one."""

    tokenizer: str  # of the `tokenizers` library, as JSON
    separator: int
    dtype: np.dtype
    val_fraction: float
    bos_id: int | None = None  # before every document
    held_out_fraction: float = 0.0
    backend: str = "tokenizers"
    skip_unreadable: bool = False

    def __call__(self, blocks: Iterable[Block]) -> tuple[dict[str, Encoded], Tally]:
        """The documents of each of SPLITS, and what was left out."""
        contents: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        files: dict[str, list[int]] = {split: [] for split in SPLITS}
        tally = Tally()
        for block in blocks:
            for text in texts_of(block, tally, self.skip_unreadable):
                for document in cut_long(text):
                    content = document.encode("utf-8", "replace")
                    split = self._split_of(content)
                    contents[split].append(content)
                    files[split].append(block.file)
        return {split: self._encode(contents[split], files[split]) for split in SPLITS}, tally

    def _split_of(self, content: bytes) -> str:
        """By the text alone: adding files moves no document, and copies of a text are never on both sides.

        Validation takes from one end and held-out from the other, so changing one moves no document of the other.
        """
        place = xxhash.xxh3_64_intdigest(content)
        if place < self.val_fraction * 2**64:
            return "val"
        return "held_out" if place >= (1 - self.held_out_fraction) * 2**64 else "train"

    def _encode(self, contents: list[bytes], files: list[int]) -> Encoded:
        before = np.array([] if self.bos_id is None else [self.bos_id], dtype=np.uint32)
        separator = np.array([self.separator], dtype=np.uint32)
        ids = self._ids(contents)
        parts = [part for document in ids for part in (before, document, separator)]
        tokens = np.concatenate(parts, dtype=self.dtype, casting="unsafe") if parts else np.empty(0, dtype=self.dtype)
        ends = np.cumsum(len(before) + _lengths(ids) + 1)
        return Encoded(tokens, ends, _lengths(contents), np.array(files, dtype=np.int32))

    def _ids(self, contents: list[bytes]) -> list[np.ndarray]:
        try:
            return open_backend(self.backend, self.tokenizer).encode(contents)
        except BaseException as error:
            reraise_interrupts(error)
            if self.backend == "tokenizers":
                raise
            print(f"gigatoken failed, so tokenizers takes its place: {error}", file=sys.stderr, flush=True)
            return open_backend("tokenizers", self.tokenizer).encode(contents)


def units(source: Source) -> Iterator[Unit]:
    """The rest of the source in units whose borders depend on the files alone."""
    blocks: list[Block] = []
    size = 0
    for block in source.blocks():
        blocks.append(block)
        size += block.bytes
        if size >= UNIT_BYTES or len(blocks) == UNIT_BLOCKS:
            yield Unit(blocks, source.cursor(), source.read_bytes())
            blocks, size = [], 0
    if blocks:
        yield Unit(blocks, source.cursor(), source.read_bytes())


def encode_in_order(encoder: Encoder, source: Source, workers: int) -> Iterator[tuple[Unit, dict[str, Encoded], Tally]]:
    """Each unit of the source, its tokens and what was left out; a few units per worker are in memory at once.

    A Fault of what is not to be left out; UserError for a unit that again and again ends the process that encodes it.
    """
    rest = units(source)
    for first in rest:
        choice = choose_backend(encoder.tokenizer, _sample(first))
        print(f"encoding with {choice.name}: {choice.reason}", file=sys.stderr, flush=True)
        encode = _Encode(replace(encoder, backend=choice.name))
        all_units = itertools.chain([first], rest)
        for unit, (parts, tally) in map_in_order(encode, all_units, workers, place_of=lambda unit: unit.place):
            yield unit, parts, tally


@dataclass(frozen=True)
class _Encode:
    encoder: Encoder

    def __call__(self, unit: Unit, attempt: int) -> tuple[dict[str, Encoded], Tally]:
        """The tokens of a unit; by the slower and older library if a process has died of it."""
        encoder = self.encoder if attempt == 1 else replace(self.encoder, backend="tokenizers")
        return encoder(unit.blocks)


def _sample(unit: Unit) -> list[str]:
    """About the first SAMPLE_CHARACTERS of the unit."""
    sample, left = [], SAMPLE_CHARACTERS
    for block in unit.blocks:
        for text in texts_of(block, Tally(), skip_unreadable=True):
            sample.append(text[:left])
            left -= len(sample[-1])
            if not left:
                return sample
    return sample


def _lengths(parts: Sequence) -> np.ndarray:
    return np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
