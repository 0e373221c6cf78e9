"""The run's numbers: one JSON object a line in metrics.jsonl. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from pretrain.monitor.lines import Lines
from pretrain.optional import optional

FILE = "metrics.jsonl"

log = logging.getLogger("evenkeel")


class Metrics:
    """Appends rows to `metrics.jsonl`; a resumed run goes on in the same file, and the last row of a step counts.

    No call raises: rows that the disk does not take are kept, and written before the next one.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        """folder: the run's. With `enabled` False (ranks other than 0) every call does nothing."""
        self._lines = Lines(folder / FILE) if enabled else None
        self._said = False

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row. Values are numbers, strings, or nested dicts of them; NaN and infinity become null."""
        if self._lines is None:
            return
        with optional("rows", f"a row of kind {kind} could not be written to {self._lines.path}"):
            row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
            self._lines.append(json.dumps(_finite(row), allow_nan=False))
        self._say()

    def event(self, step: int, event: str, **values: Any) -> None:
        """A row of kind `event`: something that happened once."""
        self.write("event", step, event=event, **values)

    def close(self) -> None:
        if self._lines is None:
            return
        self._lines.close()
        if self._lines.waiting:
            log.error(f"{self._lines.waiting:,} rows are lost: {self._lines.path} still cannot be written")

    def _say(self) -> None:
        """Say it when the disk takes no rows, and when it takes them again."""
        lines = self._lines
        if lines.fault and not self._said:
            log.warning(
                f"cannot write to {lines.path} ({lines.fault.strerror}); its rows are kept until it can be written"
            )
        elif self._said and not lines.fault:
            log.info(f"{lines.path} is written again" + f"; {lines.lost:,} rows are lost" * bool(lines.lost))
        self._said = bool(lines.fault)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
