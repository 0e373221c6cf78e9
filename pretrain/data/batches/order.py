"""The order in which a run visits its samples: a permutation that is computed, not stored.

Each epoch has its own keyed permutation of 0..n-1: a Feistel network over a rectangle a x b >= n, applied again (cycle
walking) to the few values that fall outside n. So any place of any epoch costs O(1) time and memory, on any rank, for
10^12 samples as for 10. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.

Samples lie in shards, and there are two ways to shuffle them. `GlobalOrder` permutes all samples of an epoch.
`WindowedOrder` permutes the shards, takes them a window at a time and permutes the samples of each window, so that
only the shards of one window have to be at hand. Both hold a few numbers per shard and none per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class SampleOrder:
    """Maps a place in the run to a sample: a pure function of (num_samples, seed, place), shuffled again every epoch."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._rows = math.isqrt(num_samples - 1) + 1
        self._columns = -(-num_samples // self._rows)

    def __getitem__(self, place: int) -> int:
        """Return the sample at `place` >= 0 of the run; the epoch is place // num_samples."""
        return int(self.many(place, place + 1)[0])

    def many(self, start: int, stop: int) -> np.ndarray:
        """Return the samples at places start..stop-1 of the run, (stop - start,) int64."""
        return self.at(np.arange(start, stop))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the samples at any `places` of the run, both (places,) int64."""
        samples = np.empty(len(places), dtype=np.int64)
        for epoch, here, within in _by_epoch(places, self.num_samples):
            samples[here] = self.permute(epoch, within)
        return samples

    def permute(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        """Apply the epoch's permutation of 0..num_samples-1 to `numbers`; returns uint64 of the same shape."""
        keys = self._keys(epoch)
        values = self._feistel(numbers.astype(np.uint64), keys)
        while (outside := values >= self.num_samples).any():
            values[outside] = self._feistel(values[outside], keys)
        return values

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Apply one bijection of 0..rows*columns-1, uint64 to uint64."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = values // columns, _remainder(values, columns)
        for key in keys:
            row += _remainder(_scramble(column ^ key), rows)
            np.minimum(row, row - rows, out=row)  # modulo rows: what is below it already wraps to a huge number
            row, column, rows, columns = column, row, columns, rows
        return row * columns + column

    def _keys(self, epoch: int) -> np.ndarray:
        """Return the round keys of one epoch, (ROUNDS,) uint64."""
        start = np.array([(self.seed * _GOLDEN + 1) & _MASK], dtype=np.uint64)
        of_epoch = _scramble(_scramble(start) ^ np.uint64(epoch & _MASK))
        return _scramble(of_epoch + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


class Order(Protocol):
    """Maps a place in the run to a sample of a shard; every epoch of `num_samples` places visits each sample once."""

    num_samples: int

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards and the numbers in them of the samples at any `places`, all (places,) int64."""

    def epoch(self, place: int) -> int:
        """Return the epoch of `place`, from 0."""

    def window(self, place: int) -> range:
        """Return the places around `place` that need the same shards."""

    def needs(self, place: int) -> list[int]:
        """Return the shards of the window at `place`, then those of the next window; [] where any shard may be needed."""


class FileOrder:
    """The samples in the order in which they lie in the shards."""

    def __init__(self, counts: np.ndarray) -> None:
        """Order the samples of shards that hold `counts`, (shards,) int64, each; ValueError if all are 0."""
        self._counts = np.asarray(counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self.num_samples = int(self._counts.sum())
        if self.num_samples < 1:
            raise ValueError(f"an order needs at least one sample, and the {len(self._counts)} shards hold none")

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _locate(self._ends, self._counts, places % self.num_samples)

    def epoch(self, place: int) -> int:
        return place // self.num_samples

    def window(self, place: int) -> range:
        return range(1 << 62)

    def needs(self, place: int) -> list[int]:
        return []


class GlobalOrder(FileOrder):
    """All samples of all shards, shuffled together."""

    def __init__(self, counts: np.ndarray, seed: int) -> None:
        super().__init__(counts)
        self._samples = SampleOrder(self.num_samples, seed)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _locate(self._ends, self._counts, self._samples.at(places))


class WindowedOrder(FileOrder):
    """The shards in shuffled order, `window_shards` of them at a time, and the samples of a window shuffled together."""

    def __init__(self, counts: np.ndarray, seed: int, window_shards: int) -> None:
        super().__init__(counts)
        if window_shards < 1:
            raise ValueError(f"a window has at least one shard, got {window_shards}")
        self._seed = seed
        self._window_shards = window_shards
        self._line = lru_cache(maxsize=2)(self._line_up)  # for an epoch, and for the next where they meet

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, numbers = np.empty((2, len(places)), dtype=np.int64)
        for epoch, here, within in _by_epoch(places, self.num_samples):
            line = self._line(epoch)
            slots, numbers[here] = _locate(line.ends, line.counts, self._shuffle_windows(line, epoch, within))
            shards[here] = line.shards[slots]
        return shards, numbers

    def window(self, place: int) -> range:
        epoch, within = divmod(place, self.num_samples)
        line, before = self._line(epoch), epoch * self.num_samples
        start, stop = line.places_of(int(line.window_at(within)))
        return range(before + start, before + stop)

    def needs(self, place: int) -> list[int]:
        epoch, within = divmod(place, self.num_samples)
        line = self._line(epoch)
        window = int(line.window_at(within))
        following = line.shards_of(window + 1) or self._line(epoch + 1).shards_of(0)
        return list(dict.fromkeys(line.shards_of(window) + following))

    def _line_up(self, epoch: int) -> _Line:
        holding = np.flatnonzero(self._counts)
        shards = holding[SampleOrder(len(holding), self._seed).permute(epoch, np.arange(len(holding)))]
        counts = self._counts[shards]
        ends = np.cumsum(counts)
        window_ends = np.append(ends[self._window_shards - 1 : -1 : self._window_shards], ends[-1])
        return _Line(shards, counts, ends, window_ends, self._window_shards)

    def _shuffle_windows(self, line: _Line, epoch: int, places: np.ndarray) -> np.ndarray:
        """Map places of an epoch to samples of its line of shards, each in the window of its place."""
        samples = np.empty_like(places)
        windows = line.window_at(places)
        for window in np.unique(windows).tolist():
            here, (start, stop) = windows == window, line.places_of(window)
            order = SampleOrder(stop - start, derived_seed(self._seed, window))
            samples[here] = order.permute(epoch, places[here] - start).astype(np.int64) + start
        return samples


class _Line(NamedTuple):
    """The shards of one epoch in its order, int64 (shards,) each, without those that have no samples."""

    shards: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray  # (windows,)
    window_shards: int

    def window_at(self, places: int | np.ndarray) -> np.ndarray:
        """Return the number of the window that holds each place of the epoch."""
        return np.searchsorted(self.window_ends, places, side="right")

    def places_of(self, window: int) -> tuple[int, int]:
        """Return the window's first place in the epoch, and the one after its last."""
        return int(self.window_ends[window - 1]) if window else 0, int(self.window_ends[window])

    def shards_of(self, window: int) -> list[int]:
        """Return the shards of the window; [] for a window after the last."""
        return self.shards[window * self.window_shards : (window + 1) * self.window_shards].tolist()


def derived_seed(seed: int, number: int) -> int:
    """Return the seed of the `number`-th of several independent orders of a run with this `seed`."""
    return int(_scramble(np.array([(seed * _GOLDEN + 1 + number) & _MASK], dtype=np.uint64))[0])


def _by_epoch(places: np.ndarray, num_samples: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield, for each epoch of `places` (int64), its number, a mask of its places, and those places counted within it."""
    if len(places) and places.min() < 0:
        raise IndexError(f"places in the run start at 0, got {places.min()}")
    epochs, within = np.divmod(places, num_samples)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        yield epoch, here, within[here]


def _locate(ends: np.ndarray, counts: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map samples that are counted over consecutive shards to (shards, numbers in them)."""
    shards = np.searchsorted(ends, samples, side="right")
    return shards, samples - (ends - counts)[shards]


def _remainder(values: np.ndarray, divisor: np.uint64) -> np.ndarray:
    """Return values % divisor, ten times as fast: numpy has a vector division by one number, and no such remainder."""
    return values - values // divisor * divisor


def _scramble(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of uint64 that mixes every bit into all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
