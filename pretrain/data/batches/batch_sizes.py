"""The number of samples in each step: one number, or one that grows while the run consumes its first samples.

    size(s) = start + k increment,    k = floor(s / ramp_samples * n), at most n = (end - start) / increment

s is the number of samples consumed before the step. So the size of a step is a function of the place in the data where it
begins, on any number of ranks and after any restart. Where the size grows by more than one increment from a step to the
next, it skips some.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The samples of a global batch, by the samples consumed before it.

    Attributes:
        start: of the first step.
        end: after the ramp, and the largest.
        increment: by which it grows at a time. It divides `end - start`.
        ramp_samples: consumed when the size has become `end`.
    """

    start: int
    end: int
    increment: int = 1
    ramp_samples: float = 0.0

    @classmethod
    def constant(cls, size: int) -> BatchSizes:
        """Return the sizes of a run whose steps are all of one size."""
        return cls(size, size)

    def at(self, sample: int) -> int:
        """Return the size of the step that begins after `sample` samples."""
        return self.start + self.increment * self._increments(sample)

    def stretch(self, sample: int) -> tuple[int, int | None]:
        """Return the size of the step that begins after `sample` samples, and of how many steps from it on; None: of all."""
        _, size, count = next(self._stretches(sample))
        return size, count

    def after(self, sample: int, steps: int) -> int:
        """Return how many samples are consumed after `steps` steps, the first of which begins after `sample`."""
        for first, size, count in self._stretches(sample):
            if count is None or steps <= count:
                return first + steps * size
            steps -= count
        raise AssertionError("the last stretch has no end")

    def steps_between(self, sample: int, stop: int) -> int:
        """Return how many steps it takes from `sample` until at least `stop` samples are consumed."""
        steps = 0
        for first, size, count in self._stretches(sample):
            needed = max(0, -((first - stop) // size))
            if count is None or needed <= count:
                return steps + needed
            steps += count
        raise AssertionError("the last stretch has no end")

    def _increments(self, sample: int) -> int:
        most = (self.end - self.start) // self.increment
        if sample >= self.ramp_samples:
            return most
        return int(sample * most / self.ramp_samples)

    def _stretches(self, sample: int) -> Iterator[tuple[int, int, int | None]]:
        """Yield (first sample, size, number of steps) of the stretches of equal size from `sample` on; the last is endless."""
        while (size := self.at(sample)) != self.end:
            low, high = 1, 1
            while self.at(sample + high * size) == size:
                low, high = high, 2 * high
            while low < high:  # the fewest steps after which the size is another one
                middle = (low + high) // 2
                low, high = (middle + 1, high) if self.at(sample + middle * size) == size else (low, middle)
            yield sample, size, low
            sample += low * size
        yield sample, size, None
