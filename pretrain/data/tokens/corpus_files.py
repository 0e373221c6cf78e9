"""Access to the files of a corpus: side by side in a folder, or fetched into a cache (`pretrain.data.remote`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class CorpusFiles(Protocol):
    """The files of one corpus, by the names that its manifest gives them."""

    def path(self, name: str) -> Path:
        """Return a local file with that content; block until it is here, and keep it here until `release`."""

    def release(self, name: str) -> None:
        """Allow the cache to remove the file: nothing reads it any more."""

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Begin to fetch files that are needed soon, in this order; return at once."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes start .. stop - 1 of a file, without fetching the rest."""


class LocalFiles:
    """The files of a local folder, which are always here."""

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
