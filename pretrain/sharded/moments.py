"""Statistics of a weight from its pieces, without cancellation and in one pass over memory.

Each chunk is converted to float64 in a small buffer that stays in the cache and is centred on its own mean; chunks,
and then ranks, are merged about the mean of the whole (Chan, Golub and LeVeque 1979, "Updating formulae", eq. 2.1;
Pebay 2008, SAND2008-6212, eq. 3.1, for the higher ones). Plain sums of powers would lose every digit of the standard
deviation when the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt

import torch

# Elements that are worked on at a time. torch wakes its threads for more than 32,768 elements, which costs more than
# the arithmetic of a small tensor; a large one is worth it. A GPU wants few, large kernels.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 22}
SMALL = {"cpu": 1 << 15, "cuda": 1 << 22}


@dataclass(frozen=True)
class Moments:
    """Statistics of one FULL weight: element count, mean, and sum of squared deviations from the mean."""

    count: int
    mean: float
    centred_squares: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Moments:
        """The moments of a whole weight in memory."""
        ((count, mean, squares),) = partial_moments([tensor.reshape(-1)]).tolist()
        return cls(int(count), mean, squares)

    @property
    def std(self) -> float:
        """Standard deviation with Bessel's correction; 0 for a single element."""
        return sqrt(self.centred_squares / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def squared_norm(self) -> float:
        """The squared Frobenius norm."""
        return self.centred_squares + self.count * self.mean**2


@dataclass(frozen=True)
class Statistics(Moments):
    """`Moments`, and what is seen of the tails: sums of third and fourth powers of deviations, and max |w|."""

    centred_cubes: float
    centred_fourths: float
    absolute_maximum: float

    @property
    def kurtosis(self) -> float:
        """The fourth standardized moment, 3 for normal values; 0 for a constant weight."""
        return self.count * self.centred_fourths / self.centred_squares**2 if self.centred_squares else 0.0


def require_finite(moments: Mapping[str, Moments], when: str) -> None:
    """Raise FloatingPointError with the name of each weight that holds NaN or infinity; `when` ends the sentence."""
    bad = [name for name, found in moments.items() if not isfinite(found.centred_squares)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise FloatingPointError(f"NaN or infinity in {', '.join(bad[:3])}{more} {when}")


def partial_moments(flats: Iterable[torch.Tensor]) -> torch.Tensor:
    """(tensors, 3) float64 on the device of `flats`: count, mean and centred sum of squares of each flat tensor."""
    return _partial(flats, lambda centred, _: [_squared_norm(centred)])


def partial_statistics(flats: Iterable[torch.Tensor]) -> torch.Tensor:
    """(tensors, 6) float64: as `partial_moments`, then centred cubes, centred fourth powers, absolute maximum."""

    def powers(centred: torch.Tensor, chunk: torch.Tensor) -> list[torch.Tensor]:
        squares = torch.square(centred, out=_buffer(centred.device, CHUNK[centred.device.type], 1)[: len(centred)])
        largest = chunk.abs().amax().double() if len(chunk) else centred.new_zeros(())
        second, fourth = _squared_norm(centred), _squared_norm(squares)
        return [second, squares.mul_(centred).sum(), fourth, largest]

    return _partial(flats, powers)


def merge(parts: torch.Tensor) -> torch.Tensor:
    """Merge partial moments or statistics along the first dimension.

    parts: (parts, ..., 3 or 6) float64 as from `partial_moments` or `partial_statistics`; returns (..., 3 or 6).
    """
    if len(parts) == 1:
        return parts[0]
    count, mean, squares = parts[..., :3].unbind(-1)
    total = count.sum(0)
    merged_mean = (count * mean).sum(0) / total.clamp_min(1)
    away = mean - merged_mean
    merged = [total, merged_mean, (squares + count * away.square()).sum(0)]
    if parts.shape[-1] == 6:
        cubes, fourths, largest = parts[..., 3:].unbind(-1)
        merged += [
            (cubes + 3 * away * squares + count * away**3).sum(0),
            (fourths + 4 * away * cubes + 6 * away.square() * squares + count * away**4).sum(0),
            largest.amax(0),
        ]
    return torch.stack(merged, -1)


def chunks(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`flat` in pieces of the size that its device works on fastest; one empty piece of an empty tensor."""
    device = flat.device.type
    return flat.split(SMALL[device] if len(flat) < CHUNK[device] else CHUNK[device])


def squared_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The squared Euclidean distance of two flat tensors of the same length: a float64 scalar on their device."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for mine, theirs in zip(chunks(one), chunks(other), strict=True):
        difference = _in_float64(mine).sub_(theirs)
        total += _squared_norm(difference)
    return total


def _partial(
    flats: Iterable[torch.Tensor], powers: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
) -> torch.Tensor:
    """(tensors, 2 + n) float64: count and mean of each flat tensor, and the n sums that `powers` takes of a chunk.

    The results of all chunks stay on the device until they are stacked at once: a GPU is never waited for.
    """
    counts, sums, places = [], [], []
    for number, flat in enumerate(flats):
        for position, chunk in enumerate(chunks(flat)):
            values = _in_float64(chunk)
            mean = values.mean() if len(chunk) else values.new_zeros(())
            counts.append(float(len(chunk)))
            sums += [mean, *powers(values.sub_(mean), chunk)]
            places.append((position, number))
    sums = torch.stack(sums).view(len(counts), -1)
    rows = torch.cat((torch.tensor(counts, dtype=torch.float64).to(sums.device).unsqueeze(1), sums), 1)
    position, number = torch.tensor(places).to(sums.device).unbind(1)
    table = rows.new_zeros(int(max(places)[0]) + 1, places[-1][1] + 1, rows.shape[1])  # a row of zeros counts nothing
    table[position, number] = rows
    return merge(table)


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    """Not torch.dot: BLAS wakes threads of its own for the smallest of vectors."""
    return torch.linalg.vector_norm(values).square()


def _in_float64(chunk: torch.Tensor) -> torch.Tensor:
    return _buffer(chunk.device, CHUNK[chunk.device.type], 0)[: len(chunk)].copy_(chunk)


@cache
def _buffer(device: torch.device, size: int, number: int) -> torch.Tensor:
    """Float64 working memory of a device, allocated once: fresh memory would cost more than the arithmetic."""
    return torch.empty(size, dtype=torch.float64, device=device)
