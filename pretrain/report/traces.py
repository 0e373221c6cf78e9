"""Preparation of long noisy curves for drawing: thinning that keeps every spike, and smoothing."""

from __future__ import annotations

import numpy as np


def thinned(x: np.ndarray, y: np.ndarray, points: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `points` of (x, y): the smallest and the largest y of every stretch, so that no spike is lost."""
    if len(x) <= points:
        return x, y
    keep: set[int] = set()
    for stretch in np.array_split(np.arange(len(x)), points // 2):
        if np.isfinite(y[stretch]).any():
            keep |= {stretch[np.nanargmin(y[stretch])], stretch[np.nanargmax(y[stretch])]}
    kept = np.array(sorted(keep), dtype=int)
    return x[kept], y[kept]


def running_mean(y: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Return the mean of the `share` of all values around each value. NaN values are left out; the ends have fewer."""
    reach = int(len(y) * share / 2)
    finite = np.isfinite(y)
    total = np.append(0.0, np.cumsum(np.where(finite, y, 0.0)))
    count = np.append(0, np.cumsum(finite))
    first = np.maximum(np.arange(len(y)) - reach, 0)
    last = np.minimum(np.arange(len(y)) + reach + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (total[last] - total[first]) / (count[last] - count[first])
