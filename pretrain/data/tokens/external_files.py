"""Token files of other trainers as a corpus: each file is cut, in thought, into shards at ends of its documents.

So their files, often hundreds of gigabytes each, are shuffled, packed and mapped piece by piece as our own are, and
where the documents of a piece end is worked out from the index when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from pretrain.data.json_files import content_hash
from pretrain.data.tokens.checksums import hash_file
from pretrain.data.tokens.corpus import Shard, TokenShards
from pretrain.data.tokens.files import LocalFiles
from pretrain.errors import UserError

SHARD_TOKENS = 100_000_000
INDEX_BLOCK = 1 << 20
_SAMPLE_BYTES = 1 << 16


class Boundaries(Protocol):
    """Where the documents of one file end, in tokens from its start."""

    documents: int

    def ends(self, first: int, stop: int) -> np.ndarray:
        """The ends of documents first .. stop - 1, int64, not decreasing: a document may be empty."""


@dataclass(frozen=True)
class TokenFile:
    """One file of raw tokens; `boundaries` is None where its documents can only be told by their separators."""

    path: Path
    dtype: np.dtype
    tokens: int
    boundaries: Boundaries | None = None
    index: Path | None = None

    @property
    def bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Its tokens, (tokens,) `dtype`, a read-only memory map."""
        if not self.tokens:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.path, self.dtype, mode="r", shape=(self.tokens,)))


class ForeignShards(TokenShards):
    """A corpus of other trainers' files; nothing is known of their tokenizer."""

    def __init__(self, location: str, format: str, files: list[TokenFile]) -> None:
        """`files` lie in one folder, have one dtype and at least one token."""
        self._parts = [(file, *part) for file in files for part in _parts(file)]
        itemsize = files[0].dtype.itemsize
        super().__init__(
            location,
            LocalFiles(files[0].path.parent),
            [
                Shard(file.path.name, tokens, documents, tokens * itemsize, first_token=first_token)
                for file, _, _, first_token, tokens, documents in self._parts
            ],
            files[0].dtype,
            content_hash([format, files[0].dtype.name, [_identity(file) for file in files]]),
            format=format,
        )

    def _load_ends(self, shard: int) -> np.ndarray:
        file, first, stop, first_token, _, _ = self._parts[shard]
        ends = file.boundaries.ends(first, stop) - first_token
        return ends[np.diff(ends, prepend=0) > 0]


def check_one_dtype(files: list[TokenFile]) -> None:
    """UserError, naming two files, unless all have tokens of the same kind."""
    for file in files:
        if file.dtype != files[0].dtype:
            raise UserError(
                f"{files[0].path} holds {files[0].dtype.name} tokens and {file.path} {file.dtype.name} ones. "
                "Files of one corpus have one kind of token: name them one by one, as sources of their own."
            )


def check_boundaries(index: Path, boundaries: Boundaries, tokens: int) -> None:
    """UserError unless the document ends in `index` do not decrease and the last is the number of tokens."""
    last = 0
    for first in range(0, boundaries.documents, INDEX_BLOCK):
        ends = boundaries.ends(first, min(first + INDEX_BLOCK, boundaries.documents))
        steps = np.diff(ends, prepend=last)
        if steps.min() < 0:
            at = int(np.argmax(steps < 0))
            raise UserError(f"{index} says that document {first + at} ends before it begins. The index is corrupt.")
        last = int(ends[-1])
    if last != tokens:
        raise UserError(
            f"{index} says that the last document ends at token {last}, and the file of tokens has {tokens}. "
            "One of the two was cut, or belongs to other data."
        )


def _parts(file: TokenFile) -> Iterator[tuple[int, int, int, int, int]]:
    """(first document, stop document, first token, tokens, documents that are not empty) of each shard of a file."""
    first, start = 0, 0
    count = file.boundaries.documents
    while first < count and start < file.tokens:
        stop = 1 + bisect_left(
            range(count - 1), start + SHARD_TOKENS, lo=first, key=lambda at: file.boundaries.ends(at, at + 1)[0]
        )
        ends = file.boundaries.ends(first, stop)
        documents = int(np.count_nonzero(np.diff(ends, prepend=start)))
        yield first, stop, start, int(ends[-1]) - start, documents
        first, start = stop, int(ends[-1])


def _identity(file: TokenFile) -> list:
    """What tells a file from another without reading it all: its size, its index, three samples of its tokens."""
    size_bytes = file.path.stat().st_size
    samples = xxhash.xxh3_128()
    with open(file.path, "rb") as content:
        for offset in (0, size_bytes // 2, max(0, size_bytes - _SAMPLE_BYTES)):
            content.seek(offset)
            samples.update(content.read(_SAMPLE_BYTES))
    return [size_bytes, hash_file(file.index).digest(), samples.hexdigest()]
