"""Writes this rank's files of a checkpoint in a thread."""

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
Entries = dict[str, dict[str, Any]]  # of the manifest, by file


class Writing:
    """Writes this rank's files from construction on. Errors are raised by `entries`."""

    def __init__(self, folder: Path, contents: dict[Path, Any], present: list[str], rank: int) -> None:
        """Start to write.

        Args:
            folder: the checkpoint, under its temporary name.
            contents: the content of each file, by path. It is emptied as files are written.
            present: names of the files that are there already.
            rank: this rank, for messages.
        """
        self._folder, self._rank = folder, rank
        self._files_done = 0
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._entries = executor.submit(self._write, contents, present)
        executor.shutdown(wait=False)

    @property
    def done(self) -> bool:
        """Return whether all is written, or writing has failed."""
        return self._entries.done()

    def entries(self) -> Entries:
        """Return the manifest's entries for this rank's files. Waits for them.

        Raises:
            UserError, MachineFault: as in `explaining_failures`.
        """
        seen = -1
        while not self._entries.done():
            if seen != self._files_done:  # the watchdog sees progress
                seen = self._files_done
                enter("saving")
            wait([self._entries], timeout=1)
        return self._entries.result()

    def _write(self, contents: dict[Path, Any], present: list[str]) -> Entries:
        def write() -> Entries:
            names = list(present)
            while contents:  # frees each once it is written: it may be a copy
                path, content = contents.popitem()
                save_synced(path, content)
                names.append(path.relative_to(self._folder).as_posix())
                self._files_done += 1
            entries: Entries = {}
            for name in names:
                entries[name] = describe(self._folder, name)
                self._files_done += 1
            return entries

        return explaining_failures(write, self._folder, self._rank)


def explaining_failures(write: Callable[[], Result], folder: Path, rank: int) -> Result:
    """Return `write()`, which writes to the checkpoint `folder`, and raise failures of the storage with advice.

    Raises:
        MachineFault: the failure may pass by itself.
        UserError: a person must free space or mend the folder.
    """
    try:
        return write()
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        reason = os.strerror(number)
        message = f"rank {rank} could not write the checkpoint {folder}: {reason}. The older checkpoints are intact; "
        if number in TRANSIENT:
            raise MachineFault(message + "the same command continues from the newest.") from error
        raise UserError(message + "free space or fix the folder and start the same command again.") from error


def save_synced(path: Path, content: Any) -> None:
    """Write a file with `torch.save`, flushed to disk. Each attempt writes the whole file."""

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    patiently(save, f"writing {path}")
