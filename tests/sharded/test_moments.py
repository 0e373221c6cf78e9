"""Local arithmetic of moments against numpy's float64 and exact rational arithmetic, on hostile inputs."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.sharded import moments as moments_module
from pretrain.sharded.moments import (
    Moments,
    Statistics,
    merge,
    partial_moments,
    partial_statistics,
    require_finite,
    squared_distance,
)


def moments_of(pieces: list[np.ndarray]) -> Moments:
    count, mean, squares = merge(partial_moments(map(torch.from_numpy, pieces))).tolist()
    return Moments(int(count), mean, squares)


def statistics_of(pieces: list[np.ndarray]) -> Statistics:
    count, *rest = merge(partial_statistics(map(torch.from_numpy, pieces))).tolist()
    return Statistics(int(count), *rest)


def exact_variance(values: np.ndarray) -> Fraction:
    numbers = [Fraction(float(value)) for value in values]
    mean = sum(numbers) / len(numbers)
    return sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60),
    offset=st.sampled_from([0.0, 1.0, 1e4, 1e7]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_any_cut_into_pieces_gives_the_exact_variance(values, offset, cuts):
    whole = np.array(values, dtype=np.float32) + np.float32(offset)
    found = moments_of(np.split(whole, sorted(cuts)))
    assert found.count == len(whole)
    exact = float(exact_variance(whole))
    scale = float(np.abs(whole.astype(np.float64)).max())
    # float64 centring loses at most a few of its 1e-16 relative to the largest value
    assert found.std**2 == pytest.approx(exact, rel=1e-12, abs=(1e-15 * scale) ** 2)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_any_cut_into_pieces_gives_the_exact_tails(values, offset, cuts):
    whole = np.array(values, dtype=np.float32) + np.float32(offset)
    found = statistics_of(np.split(whole, sorted(cuts)))
    numbers = [Fraction(float(value)) for value in whole]
    mean = sum(numbers) / len(numbers)
    scale = float(np.abs(whole.astype(np.float64)).max())
    for power, sums in ((3, found.centred_cubes), (4, found.centred_fourths)):
        exact = float(sum((number - mean) ** power for number in numbers))
        assert sums == pytest.approx(exact, rel=1e-11, abs=1e-12 * len(whole) * scale**power)
    assert found.absolute_maximum == scale


def test_kurtosis_tells_normal_from_heavy_tails():
    generator = np.random.default_rng(4)
    normal, heavy = generator.standard_normal(200_000), generator.laplace(size=200_000)
    for values, expected in ((normal, 3.0), (heavy, 6.0)):
        values = values.astype(np.float32)
        found = statistics_of(np.split(values, [11, 70_000])).kurtosis
        away = values.astype(np.float64) - values.astype(np.float64).mean()
        assert found == pytest.approx((away**4).mean() / (away**2).mean() ** 2, rel=1e-12)
        assert found == pytest.approx(expected, rel=0.1)
    assert statistics_of([np.full(9, 0.25, np.float32)]).kurtosis == 0.0


def test_a_tiny_deviation_on_a_large_mean_keeps_its_digits():
    values = (1000.0 + 1e-3 * np.random.default_rng(0).standard_normal(300_000)).astype(np.float32)
    naive = values.astype(np.float32)
    assert moments_of(np.split(values, [7, 100_000])).std == pytest.approx(
        values.astype(np.float64).std(ddof=1), rel=1e-12
    )
    assert abs((naive * naive).mean() - naive.mean() ** 2) > 0.01, "float32 sums of squares would have done as well"


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e20, 1e37])
def test_huge_and_tiny_magnitudes_neither_overflow_nor_vanish(magnitude):
    values = (magnitude * np.random.default_rng(1).standard_normal(1000)).astype(np.float32)
    assert moments_of([values]).std == pytest.approx(values.astype(np.float64).std(ddof=1), rel=1e-12)


def test_a_constant_weight_has_deviation_zero():
    assert moments_of([np.full(10, 0.3, np.float32), np.full(3, 0.3, np.float32)]).std == 0.0


def test_one_element_and_empty_pieces():
    found = moments_of([np.array([], np.float32), np.array([5.0], np.float32), np.array([], np.float32)])
    assert (found.count, found.mean, found.std) == (1, 5.0, 0.0)


def test_a_weight_longer_than_a_chunk_is_measured_whole(monkeypatch):
    monkeypatch.setitem(moments_module.CHUNK, "cpu", 1000)
    values = np.random.default_rng(2).standard_normal(12_345).astype(np.float32)
    assert moments_of([values]).std == pytest.approx(values.astype(np.float64).std(ddof=1), rel=1e-13)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_stays_where_it_is(poison):
    healthy = np.random.default_rng(5).standard_normal(5000).astype(np.float32)
    sick = healthy.copy()
    sick[4321] = poison
    rows = partial_statistics(map(torch.from_numpy, (healthy, sick, healthy)))
    first, second, third = (Statistics(int(count), *rest) for count, *rest in rows.tolist())
    assert first == third == statistics_of([healthy])
    assert np.isnan(second.std)
    assert not np.isfinite(second.absolute_maximum)
    with pytest.raises(FloatingPointError, match=r"^NaN or infinity in b at step 7$"):
        require_finite({"a": first, "b": second, "c": third}, "at step 7")
    require_finite({"a": first, "c": third}, "at step 7")


def test_many_weights_at_once_are_each_what_they_are_alone():
    generator = np.random.default_rng(6)
    weights = [generator.standard_normal(count).astype(np.float32) + 3 for count in (1, 0, 700_001, 17, 262_144)]
    rows = partial_moments(map(torch.from_numpy, weights)).tolist()
    for weight, row in zip(weights, rows, strict=True):
        assert row == partial_moments([torch.from_numpy(weight)]).tolist()[0]
        assert row[0] == len(weight)


def test_squared_distance_is_that_of_float64(monkeypatch):
    monkeypatch.setitem(moments_module.CHUNK, "cpu", 1000)
    generator = np.random.default_rng(7)
    one = generator.standard_normal(4321).astype(np.float32)
    other = (one + 1e-6 * generator.standard_normal(4321)).astype(np.float32)
    exact = np.square(one.astype(np.float64) - other.astype(np.float64)).sum()
    assert float(squared_distance(torch.from_numpy(one), torch.from_numpy(other))) == pytest.approx(exact, rel=1e-13)


def test_squared_norm_is_that_of_the_full_weight():
    values = np.random.default_rng(3).standard_normal(999).astype(np.float32) + 0.5
    assert moments_of(np.split(values, [100])).squared_norm == pytest.approx(np.square(values.astype(np.float64)).sum())
