"""Files that are complete or absent: write aside, fsync, rename."""

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

# What the disk or the permissions are to blame for.
CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY),
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# What passes by itself now and then: a file server that is taken over by another, a network that is gone for a moment.
TRANSIENT = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ESHUTDOWN),
}
# What a file system without locks answers (Lustre mounted without flock, say); then nobody is kept out.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
PAUSES_S = (1, 2, 4, 8, 15, 30)  # after which a transient failure is tried again

_unfinished: set[Path] = set()

log = logging.getLogger("evenkeel")
T = TypeVar("T")


def patiently(action: Callable[[], T], doing: str) -> T:
    """`action()`, tried again where storage fails as TRANSIENT says, which is logged; other failures are raised at once.

    doing: "writing FILE", for the log. The action must be able to begin anew.
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
    """What the system answered, as in `errno`, where `error` comes from it: libraries wrap it, or tell it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # as libraries written in Rust do
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def require_utf8(path: Path, what: str) -> None:
    """UserError where the name of `path` is bytes that are no UTF-8. what: it is, for the message.

    For what tokenizers, safetensors and sentencepiece are to read or write; our own files may have any name.
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
    with unfinished(path.with_name(f".{path.name}.{os.getpid()}.tmp")) as aside:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    sync_folder(path.parent)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """`path`, where a file or folder is to be made that then gets its proper name: what is still there at the end goes.

    So it does when a signal ends a command line meanwhile.
    """
    _unfinished.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what this process has begun to make and will not finish."""
    for path in list(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the failure that matters is the one that left it
            path.unlink(missing_ok=True)


def overwrite(path: Path, text: str) -> None:
    """Replace what the file `path` holds where it lies, durably, which needs no room if it has `allocated_bytes` for it.

    In one write, so that a reader meets the old or the new text; only a machine that dies meanwhile leaves a mixture.
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
    """`path` open for appending after exactly its first `size_bytes` bytes; UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115 - the caller keeps it open
    if file.tell() < size_bytes:
        raise UserError(
            f"{path} is shorter than the interrupted preparation had left it. Delete its folder and start again."
        )
    file.truncate(size_bytes)
    return file


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system that holds `folder`; None where it does not say."""
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
    """XXH3-128 of the file, in hexadecimal; with `sync` the file is also flushed to disk."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
