"""The writer of metrics.jsonl: one row a line. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from pretrain.monitor.lines import Lines
from pretrain.monitor.rows import AnyRow
from pretrain.optional import optional

FILE = "metrics.jsonl"

log = logging.getLogger("evenkeel")


class Metrics:
    """Appends rows to `metrics.jsonl`. A resumed run appends to the same file, and the last row of a step counts.

    No call raises: rows that the disk does not take are kept, and written before the next one.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        """Open the file in the run folder `folder`. If not `enabled` (ranks other than 0), every call does nothing."""
        self._lines = Lines(folder / FILE) if enabled else None
        self._fault_logged = False

    def write(self, row: AnyRow) -> None:
        """Append `row`, with the time. NaN and infinity become null."""
        if self._lines is None:
            return
        with optional("rows", f"a row of kind {row['kind']} could not be written to {self._lines.path}"):
            timed = {"kind": row["kind"], "step": row["step"], "time": round(time.time(), 3), **row}
            self._lines.append(json.dumps(_finite(timed), allow_nan=False))
        self._log_fault(self._lines)

    def close(self) -> None:
        """Write the rows that are kept, and log an error if some are lost."""
        if self._lines is None:
            return
        self._lines.close()
        if self._lines.waiting:
            log.error(f"{self._lines.waiting:,} rows are lost: {self._lines.path} still cannot be written")

    def _log_fault(self, lines: Lines) -> None:
        """Log once that the disk takes no rows, and once that it takes them again."""
        fault = lines.fault
        if fault is not None and not self._fault_logged:
            log.warning(f"cannot write to {lines.path} ({fault.strerror}); its rows are kept until it can be written")
        elif fault is None and self._fault_logged:
            lost = f"; {lines.lost:,} rows are lost" if lines.lost else ""
            log.info(f"{lines.path} is written again{lost}")
        self._fault_logged = fault is not None


def _finite(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
