"""Statistics of a weight from its pieces, without cancellation and in one pass over memory.

Each chunk is converted to float64 in a small buffer that stays in the cache, and is centred on its own mean. Then the
chunks, and after them the ranks, are merged about the mean of the whole (Chan, Golub and LeVeque 1979, "Updating
formulae", eq. 2.1; for the higher powers Pebay 2008, SAND2008-6212, eq. 3.1). Plain sums of powers would lose every
digit of the standard deviation when the mean is large.
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
    """Statistics of one full weight, taken in float64.

    Attributes:
        count: the number of elements.
        mean: their mean.
        centred_squares: the sum of squared deviations from the mean.
    """

    count: int
    mean: float
    centred_squares: float

    @staticmethod
    def of(tensor: torch.Tensor) -> Moments:
        """Return the moments of a whole weight in memory, of any shape and float dtype."""
        ((count, mean, squares),) = partial_moments([tensor.reshape(-1)]).tolist()
        return Moments(int(count), mean, squares)

    @property
    def std(self) -> float:
        """The standard deviation with Bessel's correction, 0 for a single element."""
        return sqrt(self.centred_squares / (self.count - 1)) if self.count > 1 else 0.0

    @property
    def squared_norm(self) -> float:
        """The squared Frobenius norm."""
        return self.centred_squares + self.count * self.mean**2


@dataclass(frozen=True)
class Statistics(Moments):
    """`Moments`, and statistics of the tails.

    Attributes:
        centred_cubes: the sum of third powers of deviations from the mean.
        centred_fourths: the sum of their fourth powers.
        absolute_maximum: the largest absolute value of an element.
    """

    centred_cubes: float
    centred_fourths: float
    absolute_maximum: float

    @property
    def kurtosis(self) -> float:
        """The fourth standardized moment, 3 for normal values and 0 for a constant weight."""
        return self.count * self.centred_fourths / self.centred_squares**2 if self.centred_squares else 0.0


def require_finite(moments: Mapping[str, Moments], when: str) -> None:
    """Raise FloatingPointError with the names of the weights that hold NaN or infinity.

    Args:
        moments: the moments of weights by name.
        when: the end of the error's sentence.
    """
    bad = [name for name, of_weight in moments.items() if not isfinite(of_weight.centred_squares)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise FloatingPointError(f"NaN or infinity in {', '.join(bad[:3])}{more} {when}")


def partial_moments(flats: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return count, mean and centred sum of squares of each flat tensor: (tensors, 3) float64 on their device."""
    return _partial(flats, lambda centred, _: [_squared_norm(centred)])


def partial_statistics(flats: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the columns of `partial_moments`, the sums of centred cubes and centred fourth powers, and the absolute
    maximum of each flat tensor: (tensors, 6) float64 on their device.
    """

    def powers(centred: torch.Tensor, chunk: torch.Tensor) -> list[torch.Tensor]:
        squares = torch.square(centred, out=_buffer(centred.device, CHUNK[centred.device.type], 1)[: len(centred)])
        largest = chunk.abs().amax().double() if len(chunk) else centred.new_zeros(())
        second, fourth = _squared_norm(centred), _squared_norm(squares)
        return [second, squares.mul_(centred).sum(), fourth, largest]

    return _partial(flats, powers)


def merge(parts: torch.Tensor) -> torch.Tensor:
    """Merge partial moments or statistics along the first dimension.

    Args:
        parts: (parts, ..., 3 or 6) float64, as from `partial_moments` or `partial_statistics`.

    Returns:
        (..., 3 or 6) float64: the statistics of the parts together.
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
    """Split a flat tensor into views of the size that its device works on fastest. An empty tensor is one chunk."""
    device = flat.device.type
    return flat.split(SMALL[device] if len(flat) < CHUNK[device] else CHUNK[device])


def squared_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the squared Euclidean distance of two flat tensors of the same length: a float64 scalar on their device."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for mine, theirs in zip(chunks(one), chunks(other), strict=True):
        difference = _in_float64(mine).sub_(theirs)
        total += _squared_norm(difference)
    return total


def _partial(
    flats: Iterable[torch.Tensor], powers: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
) -> torch.Tensor:
    """Return count and mean of each flat tensor, and the n sums that `powers` takes of a chunk: (tensors, 2 + n) float64.

    The results of all chunks stay on the device until they are stacked, so that nothing waits for a GPU.

    Args:
        flats: at least one flat tensor, all on one device.
        powers: maps a chunk's centred values in float64, which it may overwrite, and the chunk to n scalars.
    """
    counts: list[float] = []
    scalars: list[torch.Tensor] = []
    places: list[tuple[int, int]] = []  # (position of the chunk in its tensor, number of the tensor)
    for number, flat in enumerate(flats):
        for position, chunk in enumerate(chunks(flat)):
            values = _in_float64(chunk)
            mean = values.mean() if len(chunk) else values.new_zeros(())
            counts.append(float(len(chunk)))
            scalars += [mean, *powers(values.sub_(mean), chunk)]
            places.append((position, number))
    sums = torch.stack(scalars).view(len(counts), -1)
    rows = torch.cat((torch.tensor(counts, dtype=torch.float64).to(sums.device).unsqueeze(1), sums), 1)
    positions, numbers = torch.tensor(places).to(sums.device).unbind(1)
    table = rows.new_zeros(int(max(places)[0]) + 1, places[-1][1] + 1, rows.shape[1])  # a row of zeros counts nothing
    table[positions, numbers] = rows
    return merge(table)


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    # Not torch.dot: BLAS wakes threads of its own for the smallest of vectors.
    return torch.linalg.vector_norm(values).square()


def _in_float64(chunk: torch.Tensor) -> torch.Tensor:
    """Copy a chunk into the first buffer of its device; the next call overwrites it."""
    return _buffer(chunk.device, CHUNK[chunk.device.type], 0)[: len(chunk)].copy_(chunk)


@cache
def _buffer(device: torch.device, size: int, number: int) -> torch.Tensor:
    """Return float64 working memory of a device, allocated once: fresh memory would cost more than the arithmetic."""
    return torch.empty(size, dtype=torch.float64, device=device)
