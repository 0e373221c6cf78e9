"""Writes files that are complete or absent: write under a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from pretrain.errors import UserError

# Errors of the disk or of permissions.
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY),
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# Errors that may pass by themselves: a file server is taken over by another, a network is gone for a moment.
TRANSIENT = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ESHUTDOWN),
}
# Errors of a file system without locks, such as Lustre mounted without flock. Then no process is kept out.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
PAUSES_S = (1, 2, 4, 8, 15, 30)  # before each new attempt after a transient failure

_unfinished: set[Path] = set()

log = logging.getLogger("evenkeel")
T = TypeVar("T")


def patiently(action: Callable[[], T], doing: str) -> T:
    """Return `action()`, tried again where it fails with a TRANSIENT error, which is logged.

    Args:
        action: it must be repeatable.
        doing: the action in words, such as "writing FILE", for the log.

    Raises:
        Exception: any other failure, at once; a transient one after the last attempt.
    """
    for pause_s in PAUSES_S:
        try:
            return action()
        except Exception as error:
            number = error_number(error)
            if number not in TRANSIENT:
                raise
            log.warning(f"{doing} failed ({os.strerror(number)}); trying again in {pause_s} s")
        time.sleep(pause_s)
    return action()


def error_number(error: BaseException | None) -> int | None:
    """Return the system's error number behind `error`, None if there is none: libraries wrap it, or have it in the message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if message := re.search(r"\(os error (\d+)\)", str(error)):  # libraries written in Rust
            return int(message[1])
        error = error.__cause__ or error.__context__
    return None


def require_utf8(path: Path, what: str) -> None:
    """Raise UserError where the name of `path` is not UTF-8.

    Tokenizers, safetensors and sentencepiece take no such names. Our own files may have any name.

    Args:
        path: a file or folder that these libraries are to read or write.
        what: the kind of file, for the message.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{what} '{path}' has a name that is not UTF-8, which the libraries that read and write there do not take. "
            "Give it another name, or reach it by a link that has one."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically and durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably."""
    with unfinished(path.with_name(f".{path.name}.{os.getpid()}.tmp")) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield `path`, a temporary name of a file or folder. If it still exists at the end, it is removed.

    It is also removed when a signal ends a command line meanwhile.
    """
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove the files and folders that this process has begun and will not finish."""
    for path in list(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the failure that left the file matters more
            path.unlink(missing_ok=True)


def overwrite(path: Path, text: str) -> None:
    """Replace the content of the file `path` in place, durably. It needs no room if the file has `allocated_bytes` for it.

    It is one write, so a reader gets the old or the new text. Only a machine that dies meanwhile leaves a mixture.
    """
    content = text.encode()
    with open(path, "r+b") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if os.pwrite(file.fileno(), content.ljust(size_bytes), 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.ftruncate(file.fileno(), len(content))
        os.fsync(file.fileno())


def allocated_bytes(path: Path) -> int:
    """Return how many bytes the file `path` can hold without further room on the disk."""
    stat = path.stat()
    return max(stat.st_size, stat.st_blocks * 512)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, atomically and durably."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def open_cut(path: Path, size_bytes: int) -> BinaryIO:
    """Open `path` for appending after its first `size_bytes` bytes. Raises UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115 - the caller keeps it open
    if file.tell() < size_bytes:
        raise UserError(
            f"{path} is shorter than the interrupted preparation had left it. Delete its folder and start again."
        )
    file.truncate(size_bytes)
    return file


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system that holds `folder`; None where it is not known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        log.warning(f"how much {folder} has free is not known: {error.strerror}")
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path, sync: bool = False) -> str:
    """Return the XXH3-128 of the file, in hexadecimal. With `sync` the file is also flushed to disk."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
