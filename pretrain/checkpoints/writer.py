"""One save under way: this rank's files, written by a thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from pretrain.checkpoints.manifest import describe
from pretrain.errors import MachineFault, UserError
from pretrain.files import TRANSIENT, error_number, patiently
from pretrain.monitor.phase import enter

Result = TypeVar("Result")
Entries = dict[str, dict[str, Any]]  # of the manifest


class Writing:
    """Writes this rank's files from construction on. Nothing raises before `entries`."""

    def __init__(self, folder: Path, contents: dict[Path, Any], present: list[str], rank: int) -> None:
        """folder: the checkpoint's. contents: what is to be in a file, by path. present: files that are there already."""
        self._folder, self._rank = folder, rank
        self._files_done = 0
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._entries = executor.submit(self._write, contents, present)
        executor.shutdown(wait=False)

    @property
    def done(self) -> bool:
        """Whether all is written, or writing has failed."""
        return self._entries.done()

    def entries(self) -> Entries:
        """What the manifest is to say of this rank's files. Waits for them; UserError if one could not be written."""
        seen = -1
        while not self._entries.done():
            if seen != self._files_done:  # it goes on: for the watchdog
                seen = self._files_done
                enter("saving")
            wait([self._entries], timeout=1)
        return self._entries.result()

    def _write(self, contents: dict[Path, Any], present: list[str]) -> Entries:
        def write() -> Entries:
            names = list(present)
            while contents:  # each goes as it is written: it may be a copy
                path, content = contents.popitem()
                _save(path, content)
                names.append(path.relative_to(self._folder).as_posix())
                self._files_done += 1
            entries: Entries = {}
            for name in names:
                entries[name] = describe(self._folder, name)
                self._files_done += 1
            return entries

        return told(write, self._folder, self._rank)


def told(write: Callable[[], Result], folder: Path, rank: int) -> Result:
    """`write()`, which writes to the checkpoint `folder`.

    Where it cannot because of the storage: MachineFault for what may pass, UserError for what only a person can mend.
    """
    try:
        return write()
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        told = f"rank {rank} could not write the checkpoint {folder}: {os.strerror(number)}. The older checkpoints are intact; "
        if number in TRANSIENT:
            raise MachineFault(told + "the same command goes on from the newest.") from error
        raise UserError(told + "free space or fix the folder and start the same command again.") from error


def _save(path: Path, content: Any) -> None:
    """`torch.save`, flushed to disk: what a failing disk has lost of one attempt the next one writes again."""

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    patiently(save, f"writing {path}")
