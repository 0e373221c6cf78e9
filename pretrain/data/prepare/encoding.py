"""Texts to tokens in several processes, in the order of the source whatever the number of processes.

One process reads and writes, the others encode. So nothing that is written depends on who encoded it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from tokenizers import Tokenizer

from pretrain.data.text.sources import Source, cut_long
from pretrain.errors import UserError

UNIT_CHARACTERS = 1 << 20
UNIT_TEXTS = 4096


@dataclass(frozen=True)
class Unit:
    """A bounded run of texts, and how far the source was after the last of them."""

    texts: list[str]
    cursor: object
    read_bytes: int


@dataclass
class Encoded:
    """The documents of a unit that belong to one split.

    tokens: each document and its separator, in the shards' dtype; ends: where each document ends in them, int64;
    text_bytes: the size of each document as UTF-8, int64.
    """

    tokens: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray

    def up_to(self, tokens: int) -> Encoded:
        """The first documents, the last of which reaches `tokens`."""
        documents = int(np.searchsorted(self.ends, tokens)) + 1
        if documents >= len(self.ends):
            return self
        return Encoded(self.tokens[: self.ends[documents - 1]], self.ends[:documents], self.text_bytes[:documents])


@dataclass(frozen=True)
class Encoder:
    """What a process needs to turn texts into tokens; small enough to be sent to one."""

    backend: str  # the `tokenizers` tokenizer as JSON
    separator: int
    dtype: np.dtype
    val_fraction: float

    def __call__(self, texts: list[str]) -> dict[str, Encoded]:
        """The documents of each split, `train` and `val`."""
        documents: dict[str, list[bytes]] = {"train": [], "val": []}
        for text in texts:
            for document in filter(None, cut_long(text)):
                content = document.encode("utf-8", "replace")
                documents[self._split_of(content)].append(content)
        return {split: self._encode(contents) for split, contents in documents.items()}

    def _split_of(self, content: bytes) -> str:
        """By the text alone: adding files moves no document, and copies of a text are never on both sides."""
        return "val" if xxhash.xxh3_64_intdigest(content) < self.val_fraction * 2**64 else "train"

    def _encode(self, contents: list[bytes]) -> Encoded:
        texts = [content.decode() for content in contents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array([*encoding.ids, self.separator], dtype=self.dtype) for encoding in encodings]
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=self.dtype)
        return Encoded(tokens, np.cumsum(_lengths(ids)), _lengths(contents))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text, not the end of a document
        return tokenizer


def units(source: Source) -> Iterator[Unit]:
    """The rest of the source in units whose borders depend on the texts alone."""
    texts, characters = [], 0
    for text in source.texts():
        texts.append(text)
        characters += len(text)
        if characters >= UNIT_CHARACTERS or len(texts) == UNIT_TEXTS:
            yield Unit(texts, source.cursor(), source.read_bytes())
            texts, characters = [], 0
    if texts:
        yield Unit(texts, source.cursor(), source.read_bytes())


def encode_in_order(encoder: Encoder, source: Source, workers: int) -> Iterator[tuple[Unit, dict[str, Encoded]]]:
    """Each unit of the source with its tokens; a few units per worker are held in memory at once."""
    if workers == 1:
        yield from ((unit, encoder(unit.texts)) for unit in units(source))
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    waiting: deque = deque()
    try:
        for unit in units(source):
            waiting.append((unit, pool.submit(_encode, unit.texts)))
            if len(waiting) > 2 * workers:
                done, tokens = waiting.popleft()
                yield done, tokens.result()
        for done, tokens in waiting:
            yield done, tokens.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encoded text was killed, most likely for want of memory. Run the same command with fewer "
            "--workers: it goes on where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _lengths(parts: list) -> np.ndarray:
    return np.array([len(part) for part in parts], dtype=np.int64)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot stop its pool, and idle workers would wait for it for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(texts: list[str]) -> dict[str, Encoded]:
    return _encoder(texts)
