"""The orders over shards: every sample once an epoch, few shards at a time in a window, and no trace of the data's order."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.batches.order import FileOrder, GlobalOrder, Order, WindowedOrder, derived_seed

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
SEEDS = st.integers(-(2**63), 2**64)
EPOCHS = st.integers(0, 10**6)

Pairs = list[tuple[int, int]]


@given(counts=COUNTS, seed=SEEDS, epoch=EPOCHS, window=st.integers(0, 13))
def test_every_epoch_visits_every_sample_of_every_shard_once(
    counts: list[int], seed: int, epoch: int, window: int
) -> None:
    visited = _stretch(_order(counts, seed, window), epoch * sum(counts), (epoch + 1) * sum(counts))
    assert sorted(visited) == _all(counts)


@given(counts=COUNTS, seed=SEEDS, window=st.integers(0, 13), data=st.data())
def test_places_are_independent_of_how_they_are_asked_for(
    counts: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    order = _order(counts, seed, window)
    places = data.draw(st.lists(st.integers(0, 5 * sum(counts)), max_size=60))
    fresh = _order(counts, seed, window)
    assert _at(order, places) == [_at(fresh, [place])[0] for place in reversed(places)][::-1]


@given(counts=COUNTS, seed=SEEDS, epoch=EPOCHS, window=st.integers(1, 13))
def test_a_windowed_order_says_which_shards_it_needs_and_needs_no_more_than_a_window(
    counts: list[int], seed: int, epoch: int, window: int
) -> None:
    order, total = WindowedOrder(np.array(counts), seed, window), sum(counts)
    place, seen = epoch * total, []
    while place < (epoch + 1) * total:
        stretch = order.window(place)
        assert stretch.start == place
        assert stretch.stop <= (epoch + 1) * total
        shards = {shard for shard, _ in _stretch(order, stretch.start, stretch.stop)}
        now, following = order.needs(place)[: len(shards)], order.needs(place)[len(shards) :]
        assert set(now) == shards
        assert len(shards) <= window
        assert len(following) <= window
        next_window = order.window(stretch.stop)
        next_shards = {shard for shard, _ in _stretch(order, next_window.start, next_window.stop)}
        assert next_shards == set(following) | (next_shards & shards)
        assert order.needs(stretch.stop - 1) == order.needs(place)
        assert order.window(stretch.stop - 1) == stretch
        seen += [*shards]
        place = stretch.stop
    assert sorted(seen) == np.flatnonzero(counts).tolist()  # each shard in one window, so it is fetched once an epoch


@pytest.mark.parametrize("window", [0, 5])
def test_every_sample_is_equally_likely_at_every_place(window: int) -> None:
    counts, trials = [4, 0, 9, 1, 7], 2000
    number = {sample: row for row, sample in enumerate(_all(counts))}
    table = np.zeros((21, 21))
    for seed in range(trials):
        for place, sample in enumerate(_stretch(_order(counts, seed, window), 0, 21)):
            table[place, number[sample]] += 1
    _assert_uniform(table, trials / 21, degrees=20 * 20)


@pytest.mark.parametrize("window", [1, 4])
def test_shards_of_equal_size_make_all_places_alike_in_any_window(window: int) -> None:
    counts, trials = [4] * 6, 1200
    table = np.zeros((24, 24))
    for seed in range(trials):
        shards, numbers = _order(counts, seed, window).at(np.arange(24))
        table[np.arange(24), 4 * shards + numbers] += 1
    _assert_uniform(table, trials / 24, degrees=23 * 23)


@pytest.mark.parametrize(("counts", "window"), [([16], 0), ([5, 11], 0), ([4] * 4, 2), ([4] * 4, 4), ([97], 0)])
def test_neighbours_in_the_run_are_any_two_samples_of_a_window(counts: list[int], window: int) -> None:
    trials, total = 1000, sum(counts)
    first = np.cumsum([0, *counts[:-1]])
    inside, table = window * counts[0] or total, np.zeros((total, total))
    for seed in range(trials):
        shards, numbers = _order(counts, seed, window).at(np.arange(total))
        samples = first[shards] + numbers
        within = np.arange(total - 1) % inside != inside - 1  # pairs that do not straddle two windows
        np.add.at(table, (samples[:-1][within], samples[1:][within]), 1)
    assert (np.diag(table) == 0).all()
    pairs = table[~np.eye(total, dtype=bool)]
    if window in (0, len(counts)):
        _assert_uniform(pairs, pairs.sum() / len(pairs), degrees=len(pairs) - 1)
        return
    same = (np.arange(total)[:, None] // counts[0] == np.arange(total) // counts[0])[~np.eye(total, dtype=bool)]
    for group in (pairs[same], pairs[~same]):  # two samples of a shard are always in one window, others are at times
        _assert_uniform(group, group.sum() / len(group), degrees=len(group) - 1)


@pytest.mark.parametrize("window", [0, 3])
def test_epochs_and_seeds_give_unrelated_orders(window: int) -> None:
    counts = [100] * 10
    runs = [_numbered(counts, seed, window, epoch) for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (-1, 0)]]
    for number, one in enumerate(runs):
        for other in runs[:number]:
            assert (one == other).sum() < 12  # two random orders agree in 1 place on average
            if window == 0:
                assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 1000**0.5


def test_windows_are_shuffled_unlike_each_other() -> None:
    shards, numbers = WindowedOrder(np.full(40, 50), 0, 1).at(np.arange(40 * 50))
    assert len(np.unique(shards.reshape(40, 50), axis=1)[0]) == 1
    rows = numbers.reshape(40, 50)
    for number, one in enumerate(rows):
        assert all((one == other).sum() < 12 for other in rows[:number])


def test_derived_seeds_are_distinct() -> None:
    seeds = {derived_seed(seed, number) for seed in range(-50, 50) for number in range(100)}
    assert len(seeds) == 100 * 100


@pytest.mark.parametrize("window", [0, 64])
def test_a_trillion_samples_cost_what_a_thousand_do(window: int) -> None:
    def cost(counts: np.ndarray) -> int:
        """Return the peak of memory, in bytes, of making an order and locating samples that lie far apart."""
        tracemalloc.start()
        order = _order(counts, 1, window)
        for place in (0, int(counts.sum()) // 2, 10 * int(counts.sum()) - 100):
            shards, numbers = order.at(np.arange(place, place + 100))
            assert (numbers < counts[shards]).all()
            order.needs(place)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert cost(np.full(1000, 10**9)) < 1.5 * cost(np.full(1000, 10)) + 4096


def test_samples_are_located_by_counting_and_not_by_going_through_them() -> None:
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    def steps(total: int) -> int:
        nonlocal calls
        calls = 0
        order = GlobalOrder(np.full(100, total // 100), 3)
        sys.setprofile(count)
        order.at(np.arange(total - 8, total))
        sys.setprofile(None)
        return calls

    assert steps(10**12) <= 2 * steps(10**4)


def test_file_order_is_the_order_of_the_files() -> None:
    counts = [3, 0, 2]
    assert _stretch(FileOrder(np.array(counts)), 0, 5) == _all(counts)


def test_shards_without_samples_and_places_before_the_start_are_refused() -> None:
    with pytest.raises(ValueError, match="the 2 shards hold none"):
        GlobalOrder(np.array([0, 0]), 1)
    with pytest.raises(ValueError, match="at least one shard"):
        WindowedOrder(np.array([3]), 1, 0)
    for window in (0, 2):
        with pytest.raises(IndexError, match="start at 0"):
            _order([3, 4], 1, window).at(np.array([-1]))


def test_the_orders_never_change() -> None:
    # Runs in progress resume into these orders: a change here breaks every one of them.
    assert _stretch(GlobalOrder(np.array([3, 4]), 5), 6, 10) == [(1, 1), (0, 0), (1, 3), (1, 2)]
    assert _stretch(WindowedOrder(np.array([3, 4, 2, 5]), 5, 2), 12, 18) == [
        (2, 0),
        (2, 1),
        (3, 2),
        (1, 0),
        (1, 2),
        (3, 3),
    ]
    assert derived_seed(7, 3) == 16983547147878014814


def _order(counts, seed: int, window: int) -> Order:
    """Return a global order for window 0, else a windowed one."""
    return WindowedOrder(np.array(counts), seed, window) if window else GlobalOrder(np.array(counts), seed)


def _at(order: Order, places: list[int]) -> Pairs:
    shards, numbers = order.at(np.array(places, dtype=np.int64))
    return list(zip(shards.tolist(), numbers.tolist(), strict=True))


def _stretch(order: Order, start: int, stop: int) -> Pairs:
    return _at(order, list(range(start, stop)))


def _all(counts: list[int]) -> Pairs:
    return [(shard, number) for shard, count in enumerate(counts) for number in range(count)]


def _numbered(counts: list[int], seed: int, window: int, epoch: int) -> np.ndarray:
    """One epoch as numbers over all shards."""
    shards, numbers = _order(counts, seed, window).at(np.arange(sum(counts)) + epoch * sum(counts))
    return np.cumsum([0, *counts[:-1]])[shards] + numbers


def _assert_uniform(counts: np.ndarray, expected: float, degrees: int) -> None:
    """Chi-square within 5 standard deviations of its mean on both sides (significance below 1e-5)."""
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5, chi_square / degrees
