"""Files that are complete or absent: write aside, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import xxhash

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
