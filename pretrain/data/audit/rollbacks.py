"""The place of each step in a run's order of samples: a run that went back continues after the data that it skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.batches.batch_sizes import BatchSizes


class Positions:
    """The samples of the steps of a run, read from its metrics; without metrics, those of a run that never went back."""

    def __init__(self, metrics: Path, sizes: BatchSizes) -> None:
        self._sizes = sizes
        self._restarts = [(0, 0), *_restarts(metrics)]  # (steps, the sample at which the data continued after them)

    def before(self, step: int) -> int:
        """Return the number of samples before those of `step`; of a step that was trained twice, the last time counts."""
        after, sample = next(restart for restart in reversed(self._restarts) if restart[0] < step)
        return self._sizes.after(sample, step - 1 - after)

    def step_of(self, sample: int) -> int | None:
        """Return the step that read `sample`; None if it was skipped, or read by steps that no longer count."""
        for number, (after, first) in enumerate(self._restarts):
            step = after + self._sizes.steps_between(first, sample + 1)
            later = [restart for restart in self._restarts[number + 1 :] if restart[0] < step]
            if sample >= first and not later:
                return step
        return None


def _restarts(metrics: Path) -> Iterator[tuple[int, int]]:
    """Yield (step gone back to, first sample after the skipped ones) from the events of the newest run in the file."""
    if not metrics.is_file():
        return
    restarts: list[tuple[int, int]] = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if '"event"' not in line or not line.endswith("\n"):  # a run that was killed leaves half a line
            continue
        row = json.loads(line)
        if row.get("event") == "started":
            restarts = []
        if row.get("event") == "rolled_back":
            restarts.append((row["to_step"], row["last_sample"] + 1))
    yield from restarts
