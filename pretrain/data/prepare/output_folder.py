"""The folder that a preparation writes to: it has one writer at a time, and no files but its own."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.errors import UserError
from pretrain.files import CANNOT_WRITE, NO_LOCKS

JOURNAL = "prepare.json"
UNSHUFFLED = ".unshuffled"  # the folder of documents that are to be shuffled


@contextmanager
def writing_in(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Make `out` and keep other preparations out of it; a full disk and the like become UserErrors.

    With `shared`, only preparations that need the folder for themselves are kept out: tasks of an array job share theirs.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "a+", encoding="utf-8") as lock:
            _take(lock, out, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to '{out}': {error}. Nothing is lost: make room or mend the permissions, and run the same "
            "command again to go on."
        ) from error


def refuse_unrecorded_files(out: Path, *own: str) -> None:
    """Raise UserError, before anything is written, if `out` holds files besides `own` that no preparation recorded."""
    if not out.is_dir() or (out / JOURNAL).exists():
        return
    names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".") or entry.name == UNSHUFFLED}
    if unknown := names.difference(own):
        raise UserError(
            f"'{out}' holds files that no preparation recorded ({', '.join(sorted(unknown)[:5])}). "
            "Nothing was changed; give --out an empty or new folder."
        )


def remove(folder: Path) -> None:
    """Remove a folder of this preparation with all its files, and a link to it, if it is still there."""
    if folder.exists():
        shutil.rmtree(folder.resolve())
    if folder.is_symlink():
        folder.unlink()


def _take(lock: IO, out: Path, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another preparation is writing to '{out}' at this moment. Wait for it or stop it.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
