"""Files that are complete or absent: write aside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from pretrain.errors import UserError

# What the disk or the permissions are to blame for.
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY),
}
# What a file system without locks answers (Lustre mounted without flock, say); then nobody is kept out.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically and durably."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically and durably."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def open_cut(path: Path, size_bytes: int) -> BinaryIO:
    """`path` open for appending after exactly its first `size_bytes` bytes; UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115 - the caller keeps it open
    if file.tell() < size_bytes:
        raise UserError(
            f"{path} is shorter than the interrupted preparation had left it. Delete its folder and start again."
        )
    file.truncate(size_bytes)
    return file


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path, sync: bool = False) -> str:
    """XXH3-128 of the file, in hexadecimal; with `sync` the file is also flushed to disk."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
