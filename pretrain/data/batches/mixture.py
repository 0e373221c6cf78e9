"""The mixture of sources: each slot of a run belongs to one, exact by weight over any stretch, computed and not drawn.

A source of weight w has taken w * p samples after p slots to within less than
one, so any stretch of n slots holds within two of w * n of them. That is a P-fair schedule: sample i of a source belongs
in slots floor(i / w) .. ceil((i + 1) / w) - 1, and the earliest deadline first keeps every one there (Baruah, Cohen,
Plaxton and Varvel, "Proportionate Progress", 1996). It repeats after as many slots as the weights' common denominator.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from pretrain.errors import UserError

LONGEST_PERIOD = 1 << 16


class Mixture:
    """Maps a slot of the run to a source and a place in that source's own order: a pure function of the weights.

    Attributes:
        period: The slots after which the schedule repeats.
        weights: The shares in effect, which sum to 1: those given where their common denominator is at most 65,536, else
            the nearest multiples of 1/65,536.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Plan one period.

        Args:
            weights: One positive number per source, in any unit.

        Raises:
            UserError: A weight is not positive, or is below the resolution.
        """
        parts = _whole_parts(weights)
        self.period = sum(parts)
        self.weights = [Fraction(part, self.period) for part in parts]
        self._schedule = _earliest_deadline_first(parts)
        self._parts = np.array(parts, dtype=np.int64)
        self._places = np.empty(self.period, dtype=np.int64)
        for source, part in enumerate(parts):
            self._places[self._schedule == source] = np.arange(part)

    def at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sources, places) of any slots, all (slots,) int64."""
        if len(slots) and slots.min() < 0:
            raise IndexError(f"slots of the run start at 0, got {slots.min()}")
        rounds, within = np.divmod(slots, self.period)
        sources = self._schedule[within]
        return sources, rounds * self._parts[sources] + self._places[within]

    def taken(self, slots: int) -> np.ndarray:
        """Return the number of samples of each source in the first `slots` slots of the run, int64 (sources,)."""
        rounds, rest = divmod(slots, self.period)
        return rounds * self._parts + np.bincount(self._schedule[:rest], minlength=len(self._parts))


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers in proportion to the weights, with a sum of at most LONGEST_PERIOD."""
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise UserError(f"the weight of a source is a positive number, got {weight}.")
    shares = [Fraction(str(weight)) for weight in weights]  # 0.7 as it is written, not as the nearest binary number
    shares = [share / sum(shares) for share in shares]
    period = lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    parts = _largest_remainders(shares)
    if 0 in parts:
        raise UserError(
            f"the weight {weights[parts.index(0)]} is less than 1/{LONGEST_PERIOD} of the sum of all weights, so little "
            "that its source would never be read. Remove the source, or raise its weight."
        )
    return parts


def _largest_remainders(shares: Sequence[Fraction]) -> list[int]:
    """Return the shares in units of 1 / LONGEST_PERIOD: rounded down, then one more for those that lost most."""
    parts = [int(share * LONGEST_PERIOD) for share in shares]
    lost = sorted(range(len(shares)), key=lambda source: parts[source] - shares[source] * LONGEST_PERIOD)
    for source in lost[: LONGEST_PERIOD - sum(parts)]:
        parts[source] += 1
    return parts


def _earliest_deadline_first(parts: Sequence[int]) -> np.ndarray:
    """Return the source of each slot of one period, int64 (sum(parts),); every sample is within its window of slots."""
    period = sum(parts)
    schedule = np.empty(period, dtype=np.int64)
    waiting = [(0, source, 0) for source in range(len(parts))]  # (first slot, source, sample of it), a heap
    ready: list[tuple[int, int, int]] = []  # (slot it must come before, source, sample of it), a heap
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, sample = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(sample + 1) * period // parts[source]), source, sample))
        _, source, sample = heapq.heappop(ready)
        schedule[slot] = source
        heapq.heappush(waiting, ((sample + 1) * period // parts[source], source, sample + 1))
    return schedule
