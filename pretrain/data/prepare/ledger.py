"""Counts what each source file gave to each split, for the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.prepare.encoding import Encoded
from pretrain.data.prepare.journal import Journal


class SourceLedger:
    """The documents and tokens of each (split, source file); the journal keeps them from one process to the next."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._open: dict[str, dict] = journal.state["open_sources"]  # by split, the file whose documents are arriving

    def add(self, split: str, documents: Encoded, files: Sequence[dict]) -> None:
        """Count `documents`, which come after all that were counted; `files` are those of the source."""
        if not len(documents.files):
            return
        firsts = np.flatnonzero(np.diff(documents.files, prepend=-1))
        counts = np.diff(firsts, append=len(documents.files))
        tokens = np.add.reduceat(np.diff(documents.ends, prepend=0), firsts)
        for file, count, held in zip(documents.files[firsts].tolist(), counts.tolist(), tokens.tolist(), strict=True):
            entry = self._entry(split, file, files)
            entry["documents"] += count
            entry["tokens"] += held

    def sources(self, split: str) -> list[dict]:
        """Return {"path", "bytes": [start, stop], "documents", "tokens"} of each file that gave documents, in order."""
        entries = [*self._journal.noted("source", split), *([self._open[split]] if split in self._open else [])]
        return [{key: entry[key] for key in ("path", "bytes", "documents", "tokens")} for entry in entries]

    def _entry(self, split: str, file: int, files: Sequence[dict]) -> dict:
        entry = self._open.get(split)
        if entry is None or entry["file"] != file:
            if entry is not None:
                self._journal.note("source", split, entry)
            path, size = files[file]["path"], files[file]["bytes"]
            extent = None if size is None else [0, size]
            entry = {"file": file, "path": path, "bytes": extent, "documents": 0, "tokens": 0}
            self._open[split] = entry
        return entry
