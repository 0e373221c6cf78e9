"""Count, mean and centred sum of squares of a weight from its pieces, without cancellation.

Each chunk that fits the cache is centred on its own mean in float64; chunks, and then ranks, are merged with
Chan, Golub and LeVeque's formula (1979, "Updating formulae", eq. 2.1). Plain sums of squares would lose every digit
of the standard deviation when the mean is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

# Elements that are converted to float64 at a time: what a core's cache holds; a GPU wants few, large kernels.
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}


@dataclass(frozen=True)
class Moments:
    """Statistics of one FULL weight: element count, mean, and sum of squared deviations from the mean."""

    count: int
    mean: float
    centred_squares: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Moments:
        """The moments of a whole weight in memory."""
        count, mean, squares = partial_moments(tensor.reshape(-1)).tolist()
        return cls(int(count), mean, squares)

    @property
    def std(self) -> float:
        """Standard deviation with Bessel's correction; 0 for a single element."""
        return sqrt(self.centred_squares / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def squared_norm(self) -> float:
        """The squared Frobenius norm."""
        return self.centred_squares + self.count * self.mean**2


def partial_moments(flat: torch.Tensor) -> torch.Tensor:
    """(3,) float64 on the device of `flat`: count, mean and centred sum of squares of the elements of `flat`."""
    if flat.numel() == 0:
        return torch.zeros(3, dtype=torch.float64, device=flat.device)
    counts, means, squares = [], [], []
    for chunk in flat.split(CHUNK[flat.device.type]):
        values = chunk.double()
        mean = values.mean()
        values -= mean
        counts.append(float(len(chunk)))
        means.append(mean)
        squares.append(torch.dot(values, values))
    rows = (torch.tensor(counts, dtype=torch.float64, device=flat.device), torch.stack(means), torch.stack(squares))
    return merge(torch.stack(rows, -1))


def merge(parts: torch.Tensor) -> torch.Tensor:
    """Merge partial moments along the first dimension.

    parts: (parts, ..., 3) float64 of (count, mean, centred sum of squares); returns (..., 3) float64.
    """
    count, mean, squares = parts.unbind(-1)
    total = count.sum(0)
    merged_mean = (count * mean).sum(0) / total.clamp_min(1)
    between = (count * (mean - merged_mean).square()).sum(0)
    return torch.stack((total, merged_mean, squares.sum(0) + between), -1)
