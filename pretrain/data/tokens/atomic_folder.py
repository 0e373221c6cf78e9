"""A new folder of token files: complete under its name, or not there at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import CANNOT_WRITE, NO_LOCKS, sync_folder, unfinished


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out`, durably, when the block succeeds, and is removed when it fails.

    What a killed process left of it is removed first.

    Raises:
        UserError: `out` is anything but a new or empty folder that can be replaced, another process is making it, or
            the disk does not take it.
    """
    target = out.resolve()  # a link stays, and leads to the result
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{out}' exists already. Nothing was changed; give --out a new or empty folder.")
    if os.path.ismount(target):
        raise UserError(f"'{out}' is a mount point, which nothing can replace. Give --out a new folder below it.")
    temporary = target.with_name(f".{target.name}.evenkeel.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary.with_suffix(".lock"), out):
            if temporary.exists():
                shutil.rmtree(temporary)
            with unfinished(temporary):
                temporary.mkdir()
                yield temporary
                for file in temporary.iterdir():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
                sync_folder(temporary)
                os.replace(temporary, target)
            sync_folder(temporary.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write '{out}': {error}. Nothing was left behind; make room and run it again."
        ) from error


@contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    """Hold a lock against other processes that want to make `out`."""
    busy = UserError(f"another process is writing '{out}' at this moment. Wait for it or stop it.")
    with open(lock, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if not lock.exists() or not os.path.samestat(
            os.fstat(file.fileno()), lock.stat()
        ):  # its holder has just removed it
            raise busy
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
