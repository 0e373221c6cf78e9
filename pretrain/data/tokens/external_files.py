"""Token files of other trainers: the contract of a format, and the checks that formats share.

A format is one module that defines a `TokenFormat`; `formats` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.data.tokens.writer import token_dtype
from pretrain.errors import UserError

INDEX_BLOCK = 1 << 20


class Boundaries(Protocol):
    """The places where the documents of one file end, in tokens from its start."""

    @property
    def documents(self) -> int: ...

    def ends(self, first: int, stop: int) -> np.ndarray:
        """Return the ends of documents first .. stop - 1, int64, not decreasing: a document may be empty."""


@dataclass(frozen=True)
class ListedEnds:
    """Document ends that are listed as they are, (documents,) of any integer dtype."""

    listed: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.listed)

    def ends(self, first: int, stop: int) -> np.ndarray:
        return self.listed[first:stop].astype(np.int64)


@dataclass(frozen=True)
class TokenFile:
    """One file of raw tokens, whose documents only their separators show.

    Attributes:
        offset: the byte at which its tokens begin.
    """

    path: Path
    dtype: np.dtype
    tokens: int
    offset: int = field(default=0, kw_only=True)

    @property
    def bytes(self) -> int:
        return self.tokens * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """Return its tokens, (tokens,) `dtype`, a read-only memory map."""
        if not self.tokens:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        return np.asarray(np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(self.tokens,)))


@dataclass(frozen=True)
class IndexedFile(TokenFile):
    """One file of raw tokens beside a file `index`, which says where its documents end."""

    boundaries: Boundaries
    index: Path


@dataclass(frozen=True)
class SampledFile(IndexedFile):
    """One file of samples, whose index says where samples end. They are documents where no token is a separator."""


class TokenWriter(Protocol):
    """Writes one file of a format, with its index if the format has one."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, documents: int, empty: int) -> None:
        """Begin the file `name` in `folder`; `documents` with tokens and `empty` ones will come."""

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Add the next tokens, of `dtype`, and the document ends among them, int64, counted from the file's start."""

    def close(self) -> None:
        """Complete the files."""


@dataclass(frozen=True)
class TokenFormat:
    """One format of another trainer.

    Attributes:
        name: The name on the command line and in manifests.
        read: `read(location, dtype)` returns the files for an import; raw numbers are taken for `dtype`. UserError
            for files that are damaged or that shards cannot hold without loss.
        recognizes: `recognizes(location)` returns whether what lies there looks like this format, from names and first
            bytes. It is asked to name the format in an error.
        find: `find(location)` returns the files to train on as they are, [] if there are none; None for a format that
            has to be imported.
        writer: The class that writes one file, None for a format that is not exported.
        dtype_for: `dtype_for(vocab_size)` returns the kind of number that an export writes.
        one_file: An export makes one file, not one for each shard.
    """

    name: str
    read: Callable[[Path, np.dtype], Sequence[TokenFile]]
    recognizes: Callable[[Path], bool]
    find: Callable[[Path], list[IndexedFile]] | None = None
    writer: type[TokenWriter] | None = None
    dtype_for: Callable[[int], np.dtype] = token_dtype
    one_file: bool = False


def check_one_dtype(files: Sequence[TokenFile]) -> None:
    """Raise UserError, naming two files, unless all have tokens of the same kind."""
    for file in files:
        if file.dtype != files[0].dtype:
            raise UserError(
                f"{files[0].path} holds {files[0].dtype.name} tokens and {file.path} {file.dtype.name} ones. "
                "Files of one corpus have one kind of token: name them one by one, as sources of their own."
            )


def check_boundaries(index: Path, boundaries: Boundaries, tokens: int) -> None:
    """Raise UserError unless the document ends in `index` do not decrease and the last is the number of tokens."""
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
