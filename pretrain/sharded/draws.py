"""Initial values by position: element i of a weight is a pure function of (seed, weight name, i) and its distribution.

The flattened full weight is cut in blocks of 65,536 elements. Each block is drawn from the start of Philox streams of
its own (Salmon et al. 2011), keyed by (seed, name) with the block number in the counter. So any rank draws exactly its
piece, and no rank ever holds a full tensor. (torch's CPU generator keeps only 32 bits of its seed: with one seed per
block, a 7B model would hold two identical blocks more often than not.)

The bits are the same everywhere. Values are drawn on the CPU whatever the device, and made from the stream's integers by
sums, products, quotients and roots, which every CPU rounds in the same way. NumPy's vectorized powers and logarithms are
avoided, because their last bits depend on the CPU (hence `_power`). The C library's logarithm remains in one value of
4,000: those beyond 3.65 deviations of a normal.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import erf, exp, gamma, pi, prod, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.sharded.piece import Slice

BLOCK = 1 << 16
CHUNK = 1 << 20  # elements in the whole rows that are drawn at once where only some of their columns are kept
LN2 = 0.6931471805599453
_LOG2 = [2 / LN2 / (2 * n + 1) for n in range(8)]  # artanh's series, to base 2
_EXP2 = list(accumulate(range(1, 12), lambda term, n: term * LN2 / n, initial=1.0))  # LN2^n / n!

Stream = Callable[[int], np.random.Generator]  # maps a number to a stream of the block, which starts at its beginning


class Draw(ABC):
    """A distribution that a weight's initial values are drawn from.

    Each of the four numbers and names below is a constant, a field or a property of the subclass.
    """

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return 0.0

    if TYPE_CHECKING:  # at run time a property here would become the default of a subclass's field

        @property
        @abstractmethod
        def std(self) -> float:
            """The standard deviation of the values."""

        @property
        @abstractmethod
        def kurtosis(self) -> float:
            """Their fourth standardized moment, 3 for normal values."""

        @property
        @abstractmethod
        def description(self) -> str:
            """The name of the distribution for people."""

    @abstractmethod
    def fill_(self, out: torch.Tensor, *, seed: int, name: str, start: int) -> None:
        """Write elements [start, start + out.numel()) of a flattened weight into `out`. Local.

        Args:
            out: (elements,) contiguous float tensor on any device. Draws are float32 and are cast to its dtype.
            seed: the seed of the run.
            name: the name of the weight.
            start: the index in the flattened full weight of the first element to write.
        """


class IndependentDraw(Draw):
    """A distribution of single elements that do not depend on each other."""

    def fill_(self, out: torch.Tensor, *, seed: int, name: str, start: int) -> None:
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
        stop = start + out.numel()
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            before = block * BLOCK
            first, last = max(start, before), min(stop, before + BLOCK)
            values = self._draw(_streams(key, block), last - before)[first - before :]
            out[first - start : last - start].copy_(torch.from_numpy(values))

    @abstractmethod
    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        """Return the first `count` values of a block, float32. A value must not depend on how many follow it."""


@dataclass(frozen=True)
class Constant(IndependentDraw):
    """A distribution that gives every element one value."""

    value: float
    std = 0.0
    kurtosis = 1.0  # the smallest possible one: that of two equally likely values, however near each other

    @property
    def mean(self) -> float:
        return self.value

    @property
    def description(self) -> str:
        return f"constant {self.value:g}"

    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        return np.full(count, self.value, np.float32)


@dataclass(frozen=True)
class Normal(IndependentDraw):
    """Normal values with standard deviation `std`."""

    std: float
    kurtosis = 3.0
    description = "normal"

    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        return stream(0).standard_normal(count, np.float32) * np.float32(self.std)


@dataclass(frozen=True)
class TruncatedNormal(IndependentDraw):
    """Normal values without those more than `bound` deviations from 0.

    The bound is in deviations of the normal before the cut. The cut narrows the distribution (by 1.3% at 3, by 12% at 2).
    The normal is that much wider, so that `std` is the deviation of the values that are left.
    """

    std: float
    bound: float = 3.0

    @property
    def kurtosis(self) -> float:
        second, fourth = self._moments
        return fourth / second**2

    @property
    def description(self) -> str:
        return f"normal cut at {self.bound:g} deviations"

    @property
    def scale(self) -> float:
        """The standard deviation of the normal before the cut."""
        return self.std / sqrt(self._moments[0])

    @property
    def _inside(self) -> float:
        """The share of a normal's values within the bound."""
        return erf(self.bound / sqrt(2))

    @property
    def _moments(self) -> tuple[float, float]:
        """The second and fourth moment of the cut standard normal.

        Integrated by parts: E x^n = (n-1) E x^(n-2) - edge bound^(n-2).
        """
        edge = 2 * self.bound * exp(-(self.bound**2) / 2) / sqrt(2 * pi) / self._inside
        second = 1 - edge
        return second, 3 * second - edge * self.bound**2

    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        normals, kept, missing = stream(0), [], count
        while missing > 0:
            values = normals.standard_normal(int(missing / self._inside) + 1, np.float32)
            kept.append(values[np.abs(values) <= np.float32(self.bound)])
            missing -= len(kept[-1])
        return np.concatenate(kept)[:count] * np.float32(self.scale)


@dataclass(frozen=True)
class Uniform(IndependentDraw):
    """Uniform values within sqrt(3) `std` of 0."""

    std: float
    kurtosis = 1.8
    description = "uniform"

    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        return _centred_uniform(stream(0), count) * np.float32(self.std * sqrt(3))


@dataclass(frozen=True)
class GeneralizedGaussian(IndependentDraw):
    """Values whose density is proportional to exp(-(|x| / scale)^shape): shape 2 is the normal, 1 is Laplace's.

    Drawn as a mixture of uniforms: scale * V * G^(1/shape), with V uniform in (-1, 1) and G of the Gamma distribution
    of shape 1 + 1/shape. Given G, the density is 1 / (2 scale G^(1/shape)) where (|x| / scale)^shape < G. The density of
    G has the factor G^(1/shape), so that the average over G leaves the integral of e^-G over those G.
    """

    std: float
    shape: float

    @property
    def kurtosis(self) -> float:
        return gamma(5 / self.shape) * gamma(1 / self.shape) / gamma(3 / self.shape) ** 2

    @property
    def description(self) -> str:
        return f"generalized Gaussian of shape {self.shape:g}"

    @property
    def scale(self) -> float:
        """The `scale` of the density."""
        return self.std * sqrt(gamma(1 / self.shape) / gamma(3 / self.shape))

    def _draw(self, stream: Stream, count: int) -> np.ndarray:
        values = _power(stream(0).standard_gamma(1 + 1 / self.shape, count), 1 / self.shape)
        values *= _centred_uniform(stream(1), count)
        return values.astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class Orthogonal(Draw):
    """Orthogonal matrices of `size` rows, all equally likely (Haar's measure).

    The result is that of a QR decomposition of a matrix of normal values with a positive diagonal in R, without the
    decomposition: a product of reflections. Each turns a vector of normal values, one element shorter than the one
    before, to its first axis (Stewart 1980, SIAM J. Numer. Anal. 17, 403). Every row can be computed by itself, with the
    same bits on every CPU and for every cut. A library's QR could promise neither. A row takes 2 size² operations in
    float64.
    """

    size: int
    description = "orthogonal"

    @property
    def std(self) -> float:
        return 1 / sqrt(self.size)

    @property
    def kurtosis(self) -> float:
        return 3 * self.size / (self.size + 2)

    def fill_(self, out: torch.Tensor, *, seed: int, name: str, start: int) -> None:
        size, stop = self.size, start + out.numel()
        normals = torch.empty(size * (size + 1) // 2)
        Normal(1.0).fill_(normals, seed=seed, name=name, start=0)
        reflectors, signs = _reflectors(normals.double().numpy(), size)
        last_row, at_once = -(-stop // size), max(1, BLOCK // size)  # a block's rows stay in a core's cache
        for row in range(start // size, last_row, at_once):
            rows = np.eye(min(at_once, last_row - row), size, row)
            for column, vector in enumerate(reflectors):
                changed = rows[:, column:]
                along = (changed * vector).sum(1, keepdims=True)
                changed -= along * vector
            values, before = torch.from_numpy(rows * signs).flatten().float(), row * size
            first, last = max(start, before), min(stop, before + values.numel())
            out[first - start : last - start].copy_(values[first - before : last - before])


@dataclass(frozen=True)
class ZeroRow(Draw):
    """A matrix with one row of zeros. The other rows have the bits that they have without the zeros.

    Attributes:
        rest: the distribution of the other rows, of mean 0.
        row: the index of the row of zeros.
        shape: the shape of the matrix.
    """

    rest: Draw
    row: int
    shape: tuple[int, int]

    @property
    def std(self) -> float:
        return self.rest.std * sqrt(self._share)

    @property
    def kurtosis(self) -> float:
        return self.rest.kurtosis / self._share

    @property
    def description(self) -> str:
        return f"{self.rest.description}, row {self.row} is 0"

    @property
    def _share(self) -> float:
        """The share of elements that are drawn."""
        return 1 - 1 / self.shape[0]

    def fill_(self, out: torch.Tensor, *, seed: int, name: str, start: int) -> None:
        self.rest.fill_(out, seed=seed, name=name, start=start)
        first = self.row * self.shape[1] - start
        out[max(0, first) : max(0, first + self.shape[1])] = 0.0


def _reflectors(normals: np.ndarray, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the vectors of the reflections, and the signs of the columns that make R's diagonal positive.

    Args:
        normals: (size (size + 1) / 2,) float64 normal values, one for each element of the vectors.
        size: the rows of the matrix.

    Returns:
        Vectors v of size, size - 1, ..., 1 elements, each with v·v = 2, so that x - (x·v) v reflects x. (size,) signs.
    """
    vectors, signs = [], np.empty(size)
    for column, vector in enumerate(np.split(normals, np.cumsum(np.arange(size, 1, -1)))):
        sign = 1.0 if vector[0] >= 0 else -1.0
        vector[0] += sign * np.sqrt((vector * vector).sum())
        vectors.append(vector * np.sqrt(2 / (vector * vector).sum()))
        signs[column] = -sign
    return vectors, signs


def fill_slice_(out: torch.Tensor, draw: Draw, seed: int, name: str, part: Slice, start: int) -> None:
    """Write elements [start, start + out.numel()) of a flattened slice of a weight into `out`. Local.

    The bits are those of the full weight. A slice of columns is picked out of whole rows, a few MB of them at a time.

    Args:
        out: (elements,) contiguous float tensor on any device. Draws are float32 and are cast to its dtype.
        draw: the distribution of the full weight.
        seed: the seed of the run.
        name: the name of the weight.
        part: the tensor-parallel slice.
        start: the index in the flattened slice of the first element to write.
    """
    if part.dim != 1:
        before = 0 if part.dim is None else part.first * prod(part.shape[1:])
        draw.fill_(out, seed=seed, name=name, start=before + start)
        return
    columns, width, stop = part.shape[1], part.length, start + out.numel()
    last_row, at_once = -(-stop // width), max(1, CHUNK // columns)
    buffer = torch.empty(at_once, columns)
    for row in range(start // width, last_row, at_once):
        rows = buffer[: last_row - row]
        draw.fill_(rows.view(-1), seed=seed, name=name, start=row * columns)
        kept, before = rows[:, part.first : part.last].reshape(-1), row * width
        first, last = max(start, before), min(stop, before + len(kept))
        out[first - start : last - start].copy_(kept[first - before : last - before])


def _streams(key: int, block: int) -> Stream:
    """Return the independent random streams of one block: Philox counts in the lower words of its counter, the upper
    ones hold the numbers of block and stream.
    """

    def stream(number: int) -> np.random.Generator:
        words = np.array([0, 0, block, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=words))

    return stream


def _centred_uniform(stream: np.random.Generator, count: int) -> np.ndarray:
    """Return odd multiples of 2^-24 between -1 and 1, all equally likely: (count,) float32. No step rounds."""
    values = stream.random(count, np.float32)  # multiples of 2^-24 in [0, 1)
    values *= np.float32(2)
    values -= np.float32(1)
    values += np.float32(2**-24)
    return values


def _power(base: np.ndarray, exponent: float) -> np.ndarray:
    """Return base^exponent to 12 digits, float64, for positive bases, by operations that all CPUs round in the same way."""
    mantissa, twos = np.frexp(base)  # base = mantissa 2^twos, 1/2 <= mantissa < 1
    ratio = (mantissa - sqrt(0.5)) / (mantissa + sqrt(0.5))
    logarithm = _polynomial(_LOG2, ratio * ratio)  # ln(mantissa / sqrt(1/2)) = 2 artanh(ratio), |ratio| < 0.172
    logarithm *= ratio
    logarithm += twos
    logarithm -= 0.5
    logarithm *= exponent
    whole = np.rint(logarithm)
    return np.ldexp(_polynomial(_EXP2, logarithm - whole), whole.astype(np.int32))


def _polynomial(coefficients: Sequence[float], values: np.ndarray) -> np.ndarray:
    """Return the sum of coefficients[n] values^n."""
    *rest, last = coefficients
    result = np.full_like(values, last)
    for coefficient in reversed(rest):
        result *= values
        result += coefficient
    return result
