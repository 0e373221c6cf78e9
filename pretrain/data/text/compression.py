"""Compressed files, with one or more members, as a stream of their content."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

from pretrain.data.text.kinds import compression_of

CHUNK_BYTES = 1 << 18
_COMPRESSED_BYTES = 1 << 12  # four bytes can hold 128 KiB of content, and what a chunk holds is in memory at once
_WITH_GZIP_HEADER = 31


def content(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Return the content of `raw`, decompressed if its `name` says so.

    Raises:
        EOFError: While it is read: the file was cut.
        ValueError: While it is read: the file is damaged.
        NotImplementedError: This Python cannot decompress it.
    """
    if not (compression := compression_of(name)):
        return iter(lambda: raw.read(CHUNK_BYTES), b"")
    if compression == ".gz":
        return _members(raw, lambda: zlib.decompressobj(_WITH_GZIP_HEADER), zlib.error)
    if compression == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with `zstd --long` too
        return _members(raw, decompressor.decompressobj, zstandard.ZstdError)
    return _members_in_pieces(raw, compression)


def _members_in_pieces(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    try:  # a Python may have been built without these
        if compression == ".bz2":
            from bz2 import BZ2Decompressor

            return _members(raw, lambda: _InPieces(BZ2Decompressor()), OSError)
        from lzma import LZMADecompressor, LZMAError
    except ImportError as error:
        raise NotImplementedError(f"this Python cannot decompress {compression} ({error})") from error
    return _members(raw, lambda: _InPieces(LZMADecompressor()), LZMAError)


def _members(raw: BinaryIO, open_member: Callable[[], Any], damage: type[Exception]) -> Iterator[bytes]:
    member, began = None, False
    while chunk := raw.read(_COMPRESSED_BYTES):
        while chunk:
            if began and member is None and not (chunk := chunk.lstrip(b"\0")):  # tape archives pad with zeros
                break
            member, began = member or open_member(), True
            try:
                pieces = member.decompress(chunk)
                yield from [pieces] if isinstance(pieces, bytes) else pieces
            except damage as error:
                raise ValueError(f"{error}, before byte {raw.tell()}") from error
            chunk, member = (member.unused_data, None) if member.eof else (b"", member)
    if member is not None or not began:
        raise EOFError(f"the file ends within its compressed data, at byte {raw.tell()}")


class _InPieces:
    """A decompressor that returns its output in pieces: a few compressed bytes may hold gigabytes."""

    def __init__(self, decompressor: Any) -> None:
        self._decompressor = decompressor

    def decompress(self, chunk: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(chunk, CHUNK_BYTES)
        while not (self.eof or self._decompressor.needs_input):
            yield self._decompressor.decompress(b"", CHUNK_BYTES)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data
