"""Turns texts into tokens in several processes, in the order of the source.

One process reads and writes, the others parse and encode. So the output does not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from pretrain.data.prepare.backends import SAMPLE_CHARACTERS, choose_backend, open_backend, reraise_interrupts
from pretrain.data.prepare.workers import map_in_order
from pretrain.data.text.blocks import Block, texts_of
from pretrain.data.text.faults import Tally
from pretrain.data.text.long_texts import cut_long
from pretrain.data.text.sources import Source

UNIT_BYTES = 1 << 21
UNIT_BLOCKS = 4096  # of tiny files
SPLITS = ("train", "val", "held_out")


@dataclass(frozen=True)
class Unit:
    """A bounded run of blocks, and the cursor of the source after the last of them."""

    blocks: list[Block]
    cursor: object
    read_bytes: int

    @property
    def place(self) -> str:
        """Its place, for people."""
        places = list(dict.fromkeys(block.place for block in self.blocks))
        return " to ".join(dict.fromkeys((places[0], places[-1])))


@dataclass
class Encoded:
    """The documents of a unit that belong to one split.

    Attributes:
        tokens: (tokens,) of the shards' dtype: each document with the token before it, if any, and its separator.
        ends: (documents,) int64, the end of each document in `tokens`.
        text_bytes: (documents,) int64, the size of each document as UTF-8.
        files: (documents,) int32, the number of the source file of each document.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray
    files: np.ndarray

    def up_to(self, tokens: int) -> Encoded:
        """Return the first documents, the last of which reaches `tokens`."""
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
    """Turns blocks into tokens; small enough to be sent to another process."""

    tokenizer: str  # a tokenizer of the `tokenizers` library, as JSON
    separator: int
    dtype: np.dtype
    val_fraction: float
    bos_id: int | None = None  # before every document
    held_out_fraction: float = 0.0
    backend: str = "tokenizers"
    skip_unreadable: bool = False

    def __call__(self, blocks: Iterable[Block]) -> tuple[dict[str, Encoded], Tally]:
        """Return the documents of each of SPLITS, and the count of records left out."""
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
        """Return the split of a document, which depends on its text alone.

        So adding files moves no document, and copies of a text are never in two splits. Validation takes from one end
        and held-out from the other, so changing one fraction moves no document of the other.
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
    """Yield the rest of the source in units whose borders depend on the files alone."""
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


def encode_in_order(
    encoder: Encoder, source: Source, workers: int
) -> Generator[tuple[Unit, dict[str, Encoded], Tally], None, None]:
    """Yield each unit of the source, its tokens by split, and the count of records left out.

    A few units per worker are in memory at once.

    Args:
        encoder: The encoder; its backend is chosen here.
        source: The source, from its present place on.
        workers: The number of processes.

    Raises:
        Fault: A part is damaged or a record is bad, and the encoder does not skip it.
        UserError: Every process that encodes a unit dies.
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
        """Encode a unit; with the slower and older library if a process has died of it."""
        encoder = self.encoder if attempt == 1 else replace(self.encoder, backend="tokenizers")
        return encoder(unit.blocks)


def _sample(unit: Unit) -> list[str]:
    """Return about the first SAMPLE_CHARACTERS of the unit."""
    sample: list[str] = []
    left = SAMPLE_CHARACTERS
    for block in unit.blocks:
        for text in texts_of(block, Tally(), skip_unreadable=True):
            sample.append(text[:left])
            left -= len(sample[-1])
            if not left:
                return sample
    return sample


def _lengths(parts: Sequence) -> np.ndarray:
    return np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
