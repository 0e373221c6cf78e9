"""The order in which a run visits its samples: a permutation that is computed, not stored.

Each epoch has its own keyed permutation of 0..n-1: a Feistel network over a rectangle a x b >= n, followed again
(cycle walking) for the few values that fall outside n. So any place of any epoch costs O(1) time and memory, on any
rank, at 10^12 samples as at 10. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8
_MASK = (1 << 64) - 1


class SampleOrder:
    """Place in the run -> sample number, a pure function of (num_samples, seed, place); reshuffled every epoch."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._rows = math.isqrt(num_samples - 1) + 1
        self._columns = -(-num_samples // self._rows)

    def __getitem__(self, place: int) -> int:
        """The sample at `place` >= 0 of the run; the epoch is place // num_samples."""
        return int(self.many(place, place + 1)[0])

    def many(self, start: int, stop: int) -> np.ndarray:
        """The samples at places start..stop-1 of the run, int64 of shape (stop - start,)."""
        if start < 0:
            raise IndexError(f"places in the run start at 0, got {start}")
        samples = np.empty(max(0, stop - start), dtype=np.int64)
        place = start
        while place < stop:
            epoch, first = divmod(place, self.num_samples)
            count = min(stop - place, self.num_samples - first)
            samples[place - start : place - start + count] = self._permute(epoch, first, count)
            place += count
        return samples

    def _permute(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Where the epoch's permutation sends first..first+count-1, uint64."""
        keys = self._keys(epoch)
        values = self._feistel(np.arange(first, first + count, dtype=np.uint64), keys)
        while (outside := values >= self.num_samples).any():
            values[outside] = self._feistel(values[outside], keys)
        return values

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One bijection of 0..rows*columns-1, uint64 to uint64."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = values // columns, values % columns
        for key in keys:
            row = (row + _scramble(column ^ key) % rows) % rows
            row, column, rows, columns = column, row, columns, rows
        return row * columns + column

    def _keys(self, epoch: int) -> np.ndarray:
        """The round keys of one epoch, uint64 of shape (ROUNDS,)."""
        start = np.array([(self.seed * 0x9E3779B97F4A7C15 + 1) & _MASK], dtype=np.uint64)
        of_epoch = _scramble(_scramble(start) ^ np.uint64(epoch & _MASK))
        return _scramble(of_epoch + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _scramble(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that mixes every bit into all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
