"""Values by position: any cut of a weight draws the same numbers, and they have the distribution of their draw.

The references are densities, integrated numerically here; nothing closed-form is shared with the code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.sharded import draws
from pretrain.sharded.draws import (
    BLOCK,
    Constant,
    Draw,
    GeneralizedGaussian,
    Normal,
    Orthogonal,
    TruncatedNormal,
    Uniform,
    ZeroRow,
    fill_slice_,
)
from pretrain.sharded.piece import Slice

RANDOM = [
    Normal(0.02),
    TruncatedNormal(0.02),
    TruncatedNormal(0.3, bound=0.5),
    Uniform(0.02),
    GeneralizedGaussian(0.02, shape=0.5),
    GeneralizedGaussian(0.02, shape=1.0),
    GeneralizedGaussian(0.02, shape=2.0),
    GeneralizedGaussian(0.02, shape=6.5),
]
ALL = [*RANDOM, Constant(1.5), ZeroRow(Normal(0.02), row=2, shape=(9, 21)), ZeroRow(Uniform(1.0), row=0, shape=(2, 40))]
GOLDEN = {
    Normal(0.02): [-0.0372162275, 0.0431247316, -0.0260827374, -0.0100897001],
    TruncatedNormal(0.02): [0.0381900445, 0.00365348766, -0.0264375713, -0.0102269622],
    Uniform(0.02): [-0.0268250424, 0.0221259464, 0.0111936033, 0.0343990996],
    GeneralizedGaussian(0.02, shape=1.5): [0.0192163046, -0.000977530144, -0.00557319727, 0.00105858047],
}


def drawn(draw: Draw, start: int, count: int, *, name: str = "w", seed: int = 0) -> np.ndarray:
    out = torch.full((count,), torch.nan)
    draw.fill_(out, seed=seed, name=name, start=start)
    return out.numpy()


@contextmanager
def small_pieces() -> Iterator[None]:
    """Set blocks of 64 elements and chunks of 100, so that small weights have many."""
    sizes = draws.BLOCK, draws.CHUNK
    draws.BLOCK, draws.CHUNK = 64, 100
    try:
        yield
    finally:
        draws.BLOCK, draws.CHUNK = sizes


class Reference:
    """The distribution that a draw should have, from its density."""

    def __init__(self, draw: Draw) -> None:
        end, density = {
            Normal: lambda: (12.0, lambda t: np.exp(-t * t / 2)),
            TruncatedNormal: lambda: (draw.bound, lambda t: np.exp(-t * t / 2)),
            Uniform: lambda: (1.0, np.ones_like),
            GeneralizedGaussian: lambda: (60 ** (1 / draw.shape), lambda t: np.exp(-(t**draw.shape))),
        }[type(draw)]()
        self.draw, self.end = draw, end
        self.grid = end * np.linspace(0, 1, 400_001) ** 3  # fine where the density may have a cusp
        self.density = density(self.grid)
        self.unit = draw.std / np.sqrt(self.moment(2))

    def moment(self, order: int) -> float:
        return np.trapezoid(self.grid**order * self.density, self.grid) / np.trapezoid(self.density, self.grid)

    @property
    def kurtosis(self) -> float:
        return self.moment(4) / self.moment(2) ** 2

    def cumulative(self, values: np.ndarray) -> np.ndarray:
        """Return P(X <= values)."""
        steps = np.diff(self.grid) * (self.density[1:] + self.density[:-1]) / 2
        half = np.concatenate(([0.0], np.cumsum(steps))) / steps.sum()
        return (1 + np.sign(values) * np.interp(np.abs(values) / self.unit, self.grid, half)) / 2


@settings(max_examples=40, deadline=None)
@given(draw=st.sampled_from(ALL), cuts=st.lists(st.integers(0, 3 * 64 + 5), max_size=6))
def test_every_cut_draws_the_same_weight(draw, cuts):
    with small_pieces():
        whole = drawn(draw, 0, 3 * 64 + 5)
        edges = [0, *sorted(cuts), len(whole)]
        parts = [drawn(draw, a, b - a) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("draw", RANDOM, ids=str)
@pytest.mark.parametrize("count", [1, 2, 1000, BLOCK - 1])
def test_a_part_of_a_block_is_what_the_whole_block_begins_with(draw, count):
    np.testing.assert_array_equal(drawn(draw, BLOCK, count), drawn(draw, BLOCK, BLOCK)[:count])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), draw=st.sampled_from(ALL), dim=st.sampled_from([None, 0, 1]))
def test_a_tensor_parallel_slice_holds_the_bits_of_the_full_weight(data, draw, dim):
    shape = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    first, last = 0, 0
    if dim is not None:
        first = data.draw(st.integers(0, shape[dim] - 1))
        last = data.draw(st.integers(first + 1, shape[dim]))
    part = Slice(shape, dim, first, last)
    start = data.draw(st.integers(0, part.numel))
    out = torch.full((data.draw(st.integers(0, part.numel - start)),), torch.nan)
    with small_pieces():
        full = torch.from_numpy(drawn(draw, 0, shape[0] * shape[1])).view(shape)
        fill_slice_(out, draw, 0, "w", part, start)
    rows, columns = (slice(first, last) if dim == cut else slice(None) for cut in (0, 1))
    assert torch.equal(out, full[rows, columns].flatten()[start : start + len(out)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_pieces_of_all_ranks_make_up_the_full_weight(dim, ranks):
    """Tensor parallelism by ZeRO ranges of unequal length, with blocks and chunks as they are."""
    shape = 42, 4096 * 10
    full = torch.from_numpy(drawn(Normal(0.02), 0, 42 * 40960)).view(shape)
    edges = [shape[dim] * rank // ranks for rank in range(ranks + 1)]
    slices = []
    for first, last in pairwise(edges):
        part = Slice(shape, dim, first, last)
        cut = part.numel // 3 + 1
        pieces = [torch.empty(cut), torch.empty(part.numel - cut)]
        for piece, start in zip(pieces, (0, cut), strict=True):
            fill_slice_(piece, Normal(0.02), 0, "w", part, start)
        slices.append(torch.cat(pieces).view([last - first if d == dim else shape[d] for d in (0, 1)]))
    assert torch.equal(torch.cat(slices, dim), full)


def test_a_slice_of_columns_is_drawn_without_the_full_weight():
    sizes = []

    class Recorded(Normal):
        def fill_(self, out, **where):
            sizes.append(out.numel())
            super().fill_(out, **where)

    out = torch.empty(5 * 300)
    with small_pieces():
        fill_slice_(out, Recorded(0.02), 0, "w", Slice((300, 40), 1, 10, 15), 0)
    assert max(sizes) <= 100
    assert sum(sizes) == 300 * 40


@pytest.mark.parametrize("draw", RANDOM, ids=str)
def test_mean_std_and_kurtosis_are_those_of_the_density(draw):
    reference = Reference(draw)
    assert draw.mean == 0.0
    assert draw.kurtosis == pytest.approx(reference.kurtosis, rel=1e-6)
    values = drawn(draw, 0, 16 * BLOCK).astype(np.float64) / draw.std
    errors = np.sqrt(len(values))
    assert abs(values.mean()) < 5 / errors
    assert abs((values**2).mean() - 1) < 5 * np.sqrt(reference.kurtosis - 1) / errors
    eighth = reference.moment(8) / reference.moment(2) ** 4
    assert abs((values**4).mean() - reference.kurtosis) < 5 * np.sqrt(eighth - reference.kurtosis**2) / errors


@pytest.mark.parametrize("draw", RANDOM, ids=str)
def test_a_row_of_zeros_changes_no_other_value_and_counts_in_the_moments(draw):
    rows, columns = 5, 1 << 16
    expected = drawn(draw, 0, rows * columns).reshape(rows, columns)
    expected[3] = 0.0
    with_zeros = ZeroRow(draw, 3, (rows, columns))
    np.testing.assert_array_equal(drawn(with_zeros, 0, rows * columns).reshape(rows, columns), expected)
    values = expected.astype(np.float64)
    assert with_zeros.mean == 0.0
    assert with_zeros.std == pytest.approx(values.std(), rel=0.02)
    assert with_zeros.kurtosis == pytest.approx((values**4).mean() / (values**2).mean() ** 2, rel=0.25)


@pytest.mark.parametrize("draw", RANDOM, ids=str)
def test_values_follow_the_density(draw):
    """Kolmogorov and Smirnov: a larger distance has a chance of 0.1 %."""
    values = np.sort(drawn(draw, 0, 8 * BLOCK))
    ranks = np.arange(len(values) + 1) / len(values)
    expected = Reference(draw).cumulative(values)
    distance = max(np.abs(expected - ranks[:-1]).max(), np.abs(expected - ranks[1:]).max())
    assert distance < 1.95 / np.sqrt(len(values))


@pytest.mark.parametrize("bound", [0.5, 2.0, 3.0])
def test_cutting_the_tails_does_not_narrow_the_weight(bound):
    draw = TruncatedNormal(0.02, bound)
    values = drawn(draw, 0, 16 * BLOCK)
    error = draw.std * np.sqrt((draw.kurtosis - 1) / (4 * len(values)))
    narrowed = draw.std * np.sqrt(Reference(draw).moment(2))  # the deviation of N(0, std) after the cut
    assert abs(values.std(dtype=np.float64) - draw.std) < 5 * error < abs(narrowed - draw.std)
    limit = bound * Reference(draw).unit
    assert np.abs(values).max() <= limit * (1 + 1e-6)
    assert np.abs(values).max() > 0.999 * limit


def test_shape_2_is_the_normal_and_shape_1_is_laplaces():
    assert GeneralizedGaussian(0.02, 2.0).kurtosis == pytest.approx(3)
    assert GeneralizedGaussian(0.02, 1.0).kurtosis == pytest.approx(6)


@pytest.mark.parametrize("draw", RANDOM, ids=str)
def test_blocks_names_and_seeds_are_independent(draw):
    first = drawn(draw, 0, BLOCK)
    others = (drawn(draw, BLOCK, BLOCK), drawn(draw, 0, BLOCK, name="v"), drawn(draw, 0, BLOCK, seed=1))
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(BLOCK)
        assert abs(np.corrcoef(np.abs(first), np.abs(other))[0, 1]) < 5 / np.sqrt(BLOCK)


@pytest.mark.parametrize("draw", GOLDEN, ids=str)
def test_the_values_of_a_seed_never_change(draw):
    """Golden values, across the border of two blocks: every published run depends on these numbers."""
    values = drawn(draw, BLOCK - 2, 4, seed=7, name="model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(values, np.array(GOLDEN[draw], np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("draw", ALL, ids=str)
def test_other_dtypes_hold_the_cast_float32_draws(draw, dtype):
    out = torch.empty(100, dtype=dtype)
    draw.fill_(out, seed=0, name="w", start=5)
    assert torch.equal(out, torch.from_numpy(drawn(draw, 5, 100)).to(dtype))


@pytest.mark.parametrize("draw", ALL, ids=str)
def test_an_empty_piece_is_left_alone(draw):
    assert drawn(draw, 10, 0).size == 0


def orthogonal(size: int, **which) -> np.ndarray:
    return drawn(Orthogonal(size), 0, size * size, **which).reshape(size, size).astype(np.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 48, 150])
def test_an_orthogonal_matrix_is_orthogonal(size):
    matrix = orthogonal(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=3e-7)
    assert Orthogonal(size).std == pytest.approx(np.sqrt((matrix**2).mean()))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 30), dim=st.sampled_from([None, 0, 1]))
def test_every_cut_of_an_orthogonal_matrix_holds_its_bits(data, size, dim):
    """ZeRO's ranges and tensor-parallel slices end anywhere in a row. Also with few rows made at once."""
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    part = Slice((size, size), dim, first, last)
    start = data.draw(st.integers(0, part.numel))
    out = torch.full((data.draw(st.integers(0, part.numel - start)),), torch.nan)
    with small_pieces():
        fill_slice_(out, Orthogonal(size), 0, "w", part, start)
        full = torch.from_numpy(drawn(Orthogonal(size), 0, size * size)).view(size, size)
    rows, columns = (slice(first, last) if dim == cut else slice(None) for cut in (0, 1))
    assert torch.equal(out, full[rows, columns].flatten()[start : start + len(out)])


def test_an_orthogonal_matrix_is_a_product_of_householders_reflections():
    size = 12
    normals = drawn(Normal(1.0), 0, size * (size + 1) // 2).astype(np.float64)
    vectors = np.split(normals, np.cumsum(np.arange(size, 1, -1)))
    expected = np.diag([-np.sign(vector[0]) for vector in vectors])
    for column in reversed(range(size)):
        mirror = vectors[column].copy()
        mirror[0] += np.copysign(np.linalg.norm(mirror), mirror[0])
        reflection = np.eye(size)
        reflection[column:, column:] -= 2 * np.outer(mirror, mirror) / (mirror @ mirror)
        expected = reflection @ expected
    found = orthogonal(size)
    np.testing.assert_allclose(found, expected, atol=3e-8)
    np.testing.assert_allclose(found[:, 0], vectors[0] / np.linalg.norm(vectors[0]), atol=3e-8)  # Gram and Schmidt's


@pytest.mark.parametrize("size", [2, 3, 5])
def test_orthogonal_matrices_are_spread_evenly(size):
    """Haar's measure: each element has the moments of a coordinate on the sphere, det is as often -1 as 1, and turning
    all matrices by the same rotation changes no statistic. 4,000 seeds; five standard errors.
    """
    count = 4000
    all_of_them = np.stack([orthogonal(size, seed=seed) for seed in range(count)])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
    for matrices in (all_of_them, turn @ all_of_them, all_of_them @ turn):
        bound = 5 / np.sqrt(count)
        assert np.abs(matrices.mean(0)).max() < bound / np.sqrt(size)
        assert np.abs((matrices**2).mean(0) - 1 / size).max() < bound * np.sqrt(Orthogonal(size).kurtosis - 1) / size
        assert np.abs((matrices**4).mean(0) - 3 / (size * (size + 2))).max() < bound
    assert abs(np.linalg.det(all_of_them).mean()) < 5 / np.sqrt(count)


def test_a_constant_is_constant():
    draw = Constant(1.5)
    assert (drawn(draw, 3, BLOCK) == 1.5).all()
    assert (draw.mean, draw.std) == (1.5, 0.0)


@pytest.mark.parametrize("exponent", [2.0, 1.0, 0.37, 0.01])
def test_powers_without_the_cpus_own_functions_are_powers(exponent):
    base = 10 ** np.linspace(-30, 30, 10_001)
    np.testing.assert_allclose(draws._power(base, exponent), base**exponent, rtol=1e-12)


@pytest.mark.slow
def test_no_two_blocks_of_a_large_model_are_the_same():
    starts = {tuple(drawn(Normal(0.02), block * BLOCK, 2).tolist()) for block in range(20_000)}
    assert len(starts) == 20_000
