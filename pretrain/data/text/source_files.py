"""The files of a source: their places, sizes and versions, which show whether they have changed."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.data.text.kinds import TABLES, kind_of
from pretrain.errors import UserError

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://")


@dataclass(frozen=True)
class SourceFile:
    """One file: a path or an fsspec URL, its size in bytes, and a tag that changes with its content, if there is one."""

    path: str
    bytes: int
    version: str | None = None

    @property
    def kind(self) -> str | None:
        return kind_of(self.path)

    @property
    def is_remote(self) -> bool:
        return is_url(self.path)

    def open(self) -> BinaryIO:
        if not self.is_remote:
            return open(self.path, "rb")
        from pretrain.data.text.remote_files import open_remote

        # Only parts of a table are read; a large buffer would fetch the rest for nothing.
        return open_remote(self.path, self.bytes, 1 << 16 if self.kind in TABLES else 1 << 23)

    def check_unchanged(self) -> None:
        """Raise UserError if the file has another size or version than when it was listed, or is gone."""
        size, version = self._now()
        if size == self.bytes and (self.version is None or version is None or version == self.version):
            return
        if size != self.bytes:
            change = f"it had {self.bytes:,} bytes when it was listed, and has {size:,}"
        else:
            change = f"it was written to after it was listed, and has {size:,} bytes as before"
        raise UserError(
            f"{self.path} has changed while it was read: {change}. What was made of it may be neither the one nor the "
            "other. Wait until nothing writes to the source any more, and begin again with another --out."
        )

    def _now(self) -> tuple[int, str | None]:
        if self.is_remote:
            from pretrain.data.text.remote_files import look_up

            info = look_up(self.path)
            return int(info["size"]), version_in(info)
        try:
            found = local_file(self.path)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} has gone while it was read. Restore it, and begin again.") from error
        return found.bytes, found.version


def is_url(name: str) -> bool:
    return _URL.match(name) is not None


def local_file(path: str | Path) -> SourceFile:
    """Return a file of this machine; its version is the time of the last change, since it can change and keep its size."""
    status = os.stat(path)
    return SourceFile(str(path), status.st_size, str(status.st_mtime_ns))


def remote_file(url: str, info: dict) -> SourceFile:
    """Return the file at `url`, which its storage describes as `info`; UserError if that has no size."""
    if info.get("size") is None:
        raise UserError(f"the server does not say how large {url} is, which reading it needs. Download it first.")
    return SourceFile(url, int(info["size"]), version_in(info))


def version_in(info: dict) -> str | None:
    """Return a tag that changes with the content, where the storage has one."""
    version = next((info[key] for key in ("ETag", "etag", "blob_id", "md5Hash") if info.get(key)), None)
    return None if version is None else str(version)


def library_folder() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def share(files: Sequence[SourceFile], part: tuple[int, int]) -> list[SourceFile]:
    """Return share `part` = (number, count) of `files`: contiguous, about equal in bytes; each file is in one share."""
    number, count = part
    total = sum(file.bytes for file in files)
    chosen, start = [], 0
    for file in files:
        middle = 2 * start + file.bytes
        if min(count * middle // max(2 * total, 1), count - 1) == number:
            chosen.append(file)
        start += file.bytes
    return chosen
