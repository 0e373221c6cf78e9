"""The state of a preparation on disk: a small file that is replaced at every commit, and a log that only grows.

A corpus may have a hundred thousand files and shards. An entry for each goes to the log once, and the small file records
the length of the log. So a commit costs the same at the end of a preparation as at its beginning.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.json_files import read_json
from pretrain.data.prepare.output_folder import JOURNAL, UNSHUFFLED, remove
from pretrain.data.tokens.writer import ShardWriter
from pretrain.errors import UserError
from pretrain.files import open_cut, write_json

LOG = "prepare.log.jsonl"
COMMIT_INTERVAL_S = 5.0


def splits_of(settings: dict) -> tuple[str, ...]:
    """Return the names of the shard folders of a preparation with these settings."""
    shares = {"val": settings["val_fraction"], "held_out": settings["held_out_fraction"]}
    return ("train", *(split for split, share in shares.items() if share))


def written(writers: dict[str, ShardWriter]) -> tuple[int, int]:
    """Return the documents and tokens that all writers have taken."""
    return sum(writer.documents for writer in writers.values()), sum(writer.tokens for writer in writers.values())


class Journal:
    """The journal of a preparation, and the writers of its shards, which are committed together.

    Attributes:
        out: The folder of the preparation.
        settings: The settings that identify it, JSON.
        finished: All is done.
        state: JSON of the caller's, saved with every commit.
        writers: The writer of each split.
    """

    def __init__(self, out: Path, settings: dict) -> None:
        """Load the journal in `out`, or begin it in a new folder; UserError if `out` holds another preparation."""
        self.out = out
        self.settings = settings
        self._path = out / JOURNAL
        recorded: dict[str, Any] = (
            read_json(self._path) if self._path.exists() else {"settings": settings, "finished": False}
        )
        if recorded.get("settings") != settings:
            raise UserError(_refusal(out, recorded.get("settings", {}), settings))
        self.finished: bool = recorded["finished"]
        self.state: dict = recorded.get("state", {})
        self.writers: dict[str, ShardWriter] = {}
        if self.finished:
            (out / LOG).unlink(missing_ok=True)  # a kill may have come before that in `finish`
        else:
            if not self._path.exists():
                write_json(self._path, recorded)
            self._log = open_cut(out / LOG, recorded.get("log_bytes", 0))
            self._writers_state: dict = recorded.get("writers", {})
            self._committed = time.monotonic()

    def open_writers(self, dtype: np.dtype) -> dict[str, ShardWriter]:
        """Return a writer for each split, at the place of the last commit."""
        for split in splits_of(self.settings):
            if state := self._writers_state.get(split):
                state = state | {"closed": self.noted("shard", split)}
            self.writers[split] = ShardWriter(self.out / split, dtype, self.settings["shard_tokens"], state)
        return self.writers

    def note(self, kind: str, split: str | None, entry: dict | str) -> None:
        """Add `entry`, of one split or of all, to the log; it stays there if a commit follows."""
        self._log.write(json.dumps({"kind": kind, "split": split, "entry": entry}).encode() + b"\n")

    def noted(self, kind: str, split: str | None) -> list:
        """Return the entries of that kind and split, in order."""
        self._log.flush()
        with open(self._log.name, "rb") as lines:
            notes = [json.loads(line) for line in lines]
        return [note["entry"] for note in notes if (note["kind"], note["split"]) == (kind, split)]

    def commit_if_due(self) -> None:
        """Commit if COMMIT_INTERVAL_S have passed since the last one."""
        if time.monotonic() - self._committed >= COMMIT_INTERVAL_S:
            self.commit()

    def commit(self) -> None:
        """Make all that was written durable, and the place from which a later process continues."""
        for split, writer in self.writers.items():
            state = writer.commit()
            closed = state.pop("closed")
            for shard in closed[self._writers_state.get(split, {"shards": 0})["shards"] :]:
                self.note("shard", split, shard)
            self._writers_state[split] = state | {"shards": len(closed)}
        self._log.flush()
        os.fsync(self._log.fileno())
        write_json(
            self._path,
            {
                "settings": self.settings,
                "finished": False,
                "log_bytes": self._log.tell(),
                "writers": self._writers_state,
                "state": self.state,
            },
        )
        self._committed = time.monotonic()

    def finish(self) -> None:
        """Record that all is done, and remove the log, whose entries are in the manifests."""
        write_json(self._path, {"settings": self.settings, "finished": True})
        self.finished = True
        self._log.close()
        (self.out / LOG).unlink()


def forget(out: Path, settings: dict) -> None:
    """Remove a preparation that gave nothing, so that any other may begin in `out`."""
    for folder in (UNSHUFFLED, *splits_of(settings)):
        remove(out / folder)
    for file in (LOG, JOURNAL):
        (out / file).unlink(missing_ok=True)


def _refusal(out: Path, recorded: dict, asked: dict) -> str:
    recorded, asked = _flat(recorded), _flat(asked)
    changes = [
        "the source files have changed (names, sizes or times of change)"
        if key == "source listing"
        else f"{key} was {recorded.get(key)!r} and is now {asked.get(key)!r}"
        for key in sorted(recorded.keys() | asked.keys())
        if recorded.get(key) != asked.get(key)
    ]
    return (
        f"'{out}' holds another preparation: {'; '.join(changes)}. Nothing was changed; give the command (and source "
        "files) it was begun with to go on or see that it is complete, or another --out for this one."
    )


def _flat(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "source"} | {
        f"source {key}": value for key, value in settings.get("source", {}).items()
    }
