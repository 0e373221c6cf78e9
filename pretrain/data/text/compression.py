"""Compressed files as a stream of their content, whatever number of members they have."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

CHUNK_BYTES = 1 << 18
_COMPRESSED_BYTES = 1 << 12  # four bytes can hold 128 KiB of content, and what a chunk holds is in memory at once
_WITH_GZIP_HEADER = 31


def content(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """The content of `raw`, decompressed if its `name` says so; EOFError for a file that was cut, ValueError for another."""
    if name.endswith(".gz"):
        return _members(raw, lambda: zlib.decompressobj(_WITH_GZIP_HEADER))
    if name.endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files made with `zstd --long` too
        return _members(raw, decompressor.decompressobj)
    return iter(lambda: raw.read(CHUNK_BYTES), b"")


def _members(raw: BinaryIO, open_member: Callable[[], Any]) -> Iterator[bytes]:
    member, began = None, False
    while chunk := raw.read(_COMPRESSED_BYTES):
        while chunk:
            if began and member is None and not (chunk := chunk.lstrip(b"\0")):  # tape archives pad with zeros
                break
            member, began = member or open_member(), True
            try:
                yield member.decompress(chunk)
            except (zlib.error, zstandard.ZstdError) as error:
                raise ValueError(f"{error}, before byte {raw.tell()}") from error
            chunk, member = (member.unused_data, None) if member.eof else (b"", member)
    if member is not None or not began:
        raise EOFError(f"the file ends within its compressed data, at byte {raw.tell()}")
