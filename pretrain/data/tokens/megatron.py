"""Megatron-LM's format: PREFIX.bin, raw tokens, and PREFIX.idx, where its sequences lie and its documents end.

The index begins with 9 bytes of magic, a version, a code for the kind of token, the number of sequences s and of
document marks d + 1. Then come the length of each sequence in tokens (int32), its first byte in the .bin (int64), and
for each document the number of sequences up to its end (int64, after a leading 0). A multimodal index has a mode for
each sequence (int8) after that. All numbers are little-endian. Source: megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from pretrain.data.tokens.external_files import INDEX_BLOCK, IndexedFile, TokenFormat, check_boundaries
from pretrain.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_UINT16_BELOW = 65_500  # ids; Megatron's own rule


@dataclass(frozen=True)
class Index:
    """The arrays of one .idx, as memory maps; `marks` has one entry more than there are documents."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    marks: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.marks) - 1

    @property
    def tokens(self) -> int:
        return (int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])) if len(self.lengths) else 0

    def ends(self, first: int, stop: int) -> np.ndarray:
        """Return the ends of documents first .. stop - 1, in tokens, int64: the end of the last sequence of each."""
        last = self.marks[first + 1 : stop + 1] - 1
        begun = last >= 0  # documents before the first sequence are empty
        ends = np.zeros(len(last), np.int64)
        ends[begun] = self.pointers[last[begun]] // self.dtype.itemsize + self.lengths[last[begun]]
        return ends

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (number of the first, lengths, pointers) of the sequences, a block at a time."""
        for first in range(0, len(self.lengths), INDEX_BLOCK):
            part = slice(first, first + INDEX_BLOCK)
            yield first, self.lengths[part].astype(np.int64), self.pointers[part]


def token_files(location: Path) -> list[IndexedFile]:
    """Return the files at a prefix (or its .idx or .bin) or in a folder, by name, checked against their indexes.

    Returns:
        The files; [] if there are none.

    Raises:
        UserError: An index is damaged or does not fit its .bin; the message names the file.
    """
    return [_token_file(read_index(path)) for path in _index_paths(location)]


def lossless_files(location: Path) -> list[IndexedFile]:
    """Return `token_files(location)`, or raise UserError where an import of them would lose something."""
    indexes = [read_index(path) for path in _index_paths(location)]
    files = [_token_file(index) for index in indexes]
    for index in indexes:
        _check_lossless(index)
    return files


def _index_paths(location: Path) -> list[Path]:
    if location.is_dir():
        return sorted(location.glob("*.idx"))
    prefix = str(location).removesuffix(".idx").removesuffix(".bin")
    return [index] if (index := Path(prefix + ".idx")).is_file() else []


def _check_lossless(index: Index) -> None:
    """Raise UserError unless every document is one sequence or empty: only then is the place of its end enough."""
    for first in range(0, index.documents, INDEX_BLOCK):
        sequences = np.diff(index.marks[first : first + INDEX_BLOCK + 1])
        if sequences.max() > 1:
            at = int(np.argmax(sequences > 1))
            raise UserError(
                f"document {first + at} of {index.path} is {sequences[at]} sequences, and an import would lose where "
                "they end. Train on the Megatron files directly, or make them again without --split-sentences."
            )
    for first, lengths, _ in index.blocks():
        if lengths.min() < 1:
            raise UserError(
                f"sequence {first + int(np.argmin(lengths))} of {index.path} has no tokens, and an import would lose "
                "it. Train on the Megatron files directly, or make them again."
            )


class MegatronWriter:
    """Writes folder/NAME.bin and .idx, every document one sequence; an empty document is one without sequences."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, documents: int, empty: int) -> None:
        self.dtype = dtype
        self._closing = ExitStack()
        self._bin = self._open(folder / f"{name}.bin", "wb")
        index = folder / f"{name}.idx"
        code = next(code for code, kind in CODES.items() if np.dtype(kind) == dtype)
        index.write_bytes(HEADER.pack(MAGIC, 1, code, documents, documents + empty + 1))
        self._lengths, self._pointers, self._marks = (self._open(index, "r+b") for _ in range(3))
        self._lengths.seek(HEADER.size)
        self._pointers.seek(HEADER.size + 4 * documents)
        self._marks.seek(HEADER.size + 12 * documents)
        self._marks.write(np.zeros(1, "<i8").tobytes())
        self._sequences = self._last_end = 0

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self._bin.write(tokens.data)
        if not len(ends):
            return
        lengths = np.diff(ends, prepend=self._last_end)
        held = lengths > 0
        if lengths.max() > np.iinfo(np.int32).max:
            raise UserError(f"a document of {lengths.max()} tokens does not fit in a Megatron index (int32 lengths).")
        self._lengths.write(lengths[held].astype("<i4").tobytes())
        self._pointers.write(((ends - lengths)[held] * self.dtype.itemsize).astype("<i8").tobytes())
        self._marks.write((self._sequences + np.cumsum(held)).astype("<i8").tobytes())
        self._sequences += int(np.count_nonzero(held))
        self._last_end = int(ends[-1])

    def close(self) -> None:
        self._closing.close()

    def _open(self, path: Path, mode: Literal["wb", "r+b"]) -> BinaryIO:
        return self._closing.enter_context(open(path, mode))


MEGATRON = TokenFormat(
    name="megatron",
    read=lambda location, _: lossless_files(location),
    writer=MegatronWriter,
    dtype_for=lambda vocab_size: np.dtype("<u2" if vocab_size < _UINT16_BELOW else "<i4"),
    one_file=True,
    find=token_files,
    recognizes=lambda location: bool(_index_paths(location)),
)


def _token_file(index: Index) -> IndexedFile:
    path = index.path
    tokens = path.with_name(path.name.removesuffix(".idx") + ".bin")
    if not tokens.is_file():
        raise UserError(f"{tokens} is missing, and {path} is its index. Restore it, or remove the index.")
    expected = index.tokens * index.dtype.itemsize
    if (found := tokens.stat().st_size) != expected:
        raise UserError(
            f"{tokens} has {found} bytes and its index {path.name} describes {expected} ({index.tokens} "
            f"{index.dtype.name} tokens). One of the two was cut or changed: restore it."
        )
    check_boundaries(path, index, index.tokens)
    return IndexedFile(tokens, index.dtype, index.tokens, index, path)


def read_index(path: Path) -> Index:
    """Return the index in `path`; UserError when it is damaged or holds anything but text tokens."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path} is not a Megatron index: it does not begin with {MAGIC!r}. Restore it.")
    _, version, code, sequences, marks = HEADER.unpack(head)
    kind = np.dtype(CODES.get(code, "V1"))
    if version != 1 or kind.kind not in "iu":
        raise UserError(
            f"{path} has version {version} and the code {code} for tokens; only integers of version 1 are read."
        )
    size_bytes, expected = path.stat().st_size, HEADER.size + 12 * sequences + 8 * marks
    if size_bytes == expected + sequences and sequences:
        raise UserError(f"{path} is a multimodal index; only text can be read.")
    if size_bytes != expected:
        raise UserError(
            f"{path} has {size_bytes} bytes, and its {sequences} sequences and {marks} document marks take {expected}. "
            "It was cut or changed: restore it."
        )
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    cuts = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    index = Index(
        path,
        kind,
        lengths=raw[HEADER.size : cuts[0]].view("<i4"),
        pointers=raw[cuts[0] : cuts[1]].view("<i8"),
        marks=raw[cuts[1] :].view("<i8"),
    )
    _check_index(index)
    return index


def _check_index(index: Index) -> None:
    """Raise UserError unless sequences follow each other without gaps and every one belongs to a document."""
    offset = 0
    for first, lengths, pointers in index.blocks():
        expected = offset + index.dtype.itemsize * np.concatenate([[0], np.cumsum(lengths)])
        wrong = (lengths < 0) | (pointers != expected[:-1])
        if wrong.any():
            at = int(np.argmax(wrong))
            raise UserError(
                f"{index.path} says that sequence {first + at} has {lengths[at]} tokens from byte {pointers[at]} of "
                f"the .bin, where byte {expected[at]} is the next. The index is corrupt, or its sequences lie apart."
            )
        offset = int(expected[-1])
    marks, last = index.marks, 0
    for first in range(0, len(marks), INDEX_BLOCK):
        block = marks[first : first + INDEX_BLOCK]
        if np.diff(block, prepend=last).min() < 0:
            raise UserError(f"{index.path} is corrupt: its document marks from {first} on decrease. Restore it.")
        last = int(block[-1])
    if not len(marks) or marks[0] != 0 or last != len(index.lengths):
        raise UserError(
            f"{index.path} is corrupt: its documents hold {last} sequences and it has {len(index.lengths)}. Restore it."
        )
