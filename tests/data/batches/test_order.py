"""The order of samples: every sample once an epoch, computed from (num_samples, seed, place) alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import SampleOrder


@given(num_samples=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**9))
def test_every_epoch_visits_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    visited = order.many(epoch * num_samples, (epoch + 1) * num_samples)
    assert np.array_equal(np.sort(visited), np.arange(num_samples))


@given(num_samples=st.integers(1, 50), seed=st.integers(0, 1000), start=st.integers(0, 500), length=st.integers(0, 200))
def test_any_stretch_equals_its_places_one_by_one(num_samples: int, seed: int, start: int, length: int) -> None:
    order = SampleOrder(num_samples, seed)
    stretch = order.many(start, start + length)
    assert stretch.tolist() == [order[place] for place in range(start, start + length)]


def test_a_million_samples_are_a_permutation() -> None:
    num_samples = 1_000_003
    visited = SampleOrder(num_samples, 5).many(0, num_samples)
    assert np.array_equal(np.bincount(visited, minlength=num_samples), np.ones(num_samples))


def test_the_order_works_at_a_trillion_samples() -> None:
    visited = SampleOrder(10**12, 5).many(7 * 10**12 - 1000, 7 * 10**12 + 1000)
    assert visited.min() >= 0
    assert visited.max() < 10**12
    assert len(np.unique(visited)) == 2000
    assert abs(visited.mean() / 10**12 - 0.5) < 5 * (1 / 12 / 2000) ** 0.5


def test_the_order_never_changes() -> None:
    # Runs in progress resume into this order: a change here breaks every one of them.
    assert SampleOrder(10, 0).many(0, 20).tolist() == [8, 1, 7, 0, 9, 4, 5, 2, 6, 3, 6, 3, 5, 4, 9, 8, 2, 0, 7, 1]
    assert SampleOrder(10**9, 1234).many(10**9 - 2, 10**9 + 3).tolist() == [
        824562450,
        648383826,
        268893322,
        884971900,
        497319669,
    ]


def test_epochs_and_seeds_give_different_orders() -> None:
    firsts = [SampleOrder(1000, seed).many(0, 1000) for seed in range(4)]
    firsts += [SampleOrder(1000, 0).many(epoch * 1000, (epoch + 1) * 1000) for epoch in range(1, 4)]
    for number, one in enumerate(firsts):
        for other in firsts[:number]:
            assert (one == other).sum() < 10  # two random permutations agree in 1 place on average


@pytest.mark.parametrize("num_samples", [5, 16, 97])
def test_every_sample_is_equally_likely_at_every_place(num_samples: int) -> None:
    trials = 4000
    counts = np.zeros((num_samples, num_samples))
    for seed in range(trials):
        counts[np.arange(num_samples), SampleOrder(num_samples, seed).many(0, num_samples)] += 1
    _assert_uniform(counts, trials / num_samples, degrees=(num_samples - 1) ** 2)


def test_all_orders_of_four_samples_are_equally_likely() -> None:
    trials = 6000
    orders = [tuple(SampleOrder(4, 7).many(4 * epoch, 4 * epoch + 4)) for epoch in range(trials)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    _assert_uniform(counts, trials / 24, degrees=23)


def test_neighbours_in_the_run_are_not_neighbours_in_the_data() -> None:
    num_samples = 100_000
    steps = np.diff(SampleOrder(num_samples, 3).many(0, num_samples))
    # The distance of two random samples is triangular: mean n/3, and 1 in n/2 pairs are neighbours.
    assert abs(np.abs(steps).mean() / (num_samples / 3) - 1) < 0.02
    assert (np.abs(steps) == 1).sum() < 12


def test_places_before_the_start_and_empty_data_are_refused() -> None:
    with pytest.raises(IndexError):
        SampleOrder(10, 0)[-1]
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 0)


def _assert_uniform(counts: np.ndarray, expected: float, degrees: int) -> None:
    """Chi-square within 5 standard deviations of its mean on both sides."""
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5, chi_square / degrees
