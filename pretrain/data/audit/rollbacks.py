"""Where in the run's order of samples a step begins: a run that went back goes on after the data that it left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


class Positions:
    """Of the steps of a run, as its metrics tell it; without metrics, of a run that never went back."""

    def __init__(self, metrics: Path, global_batch_size: int) -> None:
        self._batch = global_batch_size
        self._restarts = [(0, 0), *_restarts(metrics)]  # after so many steps the data went on at that sample

    def before(self, step: int) -> int:
        """How many samples of the order lie before those of `step`, which was trained last where it was trained twice."""
        after, sample = next(restart for restart in reversed(self._restarts) if restart[0] < step)
        return sample + (step - 1 - after) * self._batch

    def step_of(self, sample: int) -> int | None:
        """The step that read `sample`; None where it was left out, or read by steps that no longer count."""
        for number, (after, first) in enumerate(self._restarts):
            step = after + (sample - first) // self._batch + 1
            later = [restart for restart in self._restarts[number + 1 :] if restart[0] < step]
            if sample >= first and not later:
                return step
        return None


def _restarts(metrics: Path) -> Iterator[tuple[int, int]]:
    """From the events of the newest run in the file: (step gone back to, first sample after those left out)."""
    found: list[tuple[int, int]] = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else ():
        if '"event"' not in line or not line.endswith("\n"):  # a run that was killed leaves half a line
            continue
        row = json.loads(line)
        if row.get("event") == "started":
            found = []
        if row.get("event") == "rolled_back":
            found.append((row["to_step"], row["last_sample"] + 1))
    yield from found
