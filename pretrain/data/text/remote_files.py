"""Remote files that can be read like local ones."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

from pretrain.data.remote.storage import Storage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def open_remote(url: str, size: int, buffer_bytes: int) -> BinaryIO:
    """Open `url` (any that fsspec opens), of `size` bytes, to read `buffer_bytes` at once; retries as `Storage` does."""
    return io.BufferedReader(_RemoteFile(url, size), buffer_bytes)


def look_up(url: str) -> dict:
    """Return the storage's current description of `url`; retries as `Storage` does."""
    return _Object(url).look_up()


class _RemoteFile(io.RawIOBase):
    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self.name = url
        self._size = size
        self._place = 0
        self._object = _Object(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._place >= self._size:
            return 0
        target = memoryview(buffer)
        content = self._object.read_bytes("", self._place, min(self._place + len(target), self._size))
        target[: len(content)] = content
        self._place += len(content)
        return len(content)


class _Object(Storage):
    """One object, known by its location alone."""

    def look_up(self) -> dict:
        return self._patiently(self.location, lambda timeout_s: self._files.info(self._root))

    def _path(self, name: str) -> str:
        return self._root

    def _url(self, name: str) -> str:
        return self.location
