"""Where the files of a corpus are: beside each other in a folder, or fetched into a cache (`pretrain.data.remote`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """The files of one corpus, by the names that its manifest gives them."""

    def path(self, name: str) -> Path:
        """A local file with that content; blocks until it is here, and keeps it here until `release`."""

    def release(self, name: str) -> None:
        """The file may go from the cache: nothing reads it any more."""

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """These files are needed soon, in this order; returns at once."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1 of a file, without the rest of it."""


class LocalFiles:
    """Files of a local folder: always here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def release(self, name: str) -> None:
        pass

    def fetch_ahead(self, names: Sequence[str]) -> None:
        pass

    def read(self, name: str, start: int, stop: int) -> bytes:
        with open(self.folder / name, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
