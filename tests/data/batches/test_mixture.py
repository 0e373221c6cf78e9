"""Mixtures: exact by weight over any stretch of the run, computed from the slot alone."""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.batches.mixture import LONGEST_PERIOD, Mixture
from pretrain.errors import UserError

WHOLE = st.lists(st.integers(1, 60), min_size=1, max_size=7)
DECIMALS = st.lists(st.decimals("0.001", "1", places=3).map(float), min_size=1, max_size=5)


@given(parts=WHOLE, slots=st.integers(0, 3000))
def test_no_source_is_ever_a_whole_sample_ahead_or_behind(parts: list[int], slots: int) -> None:
    sources, _ = Mixture(parts).at(np.arange(slots))
    for source, part in enumerate(parts):
        taken = np.cumsum(sources == source).tolist()
        share = Fraction(part, sum(parts))
        assert all(abs(count - share * (slot + 1)) < 1 for slot, count in enumerate(taken))


@given(weights=DECIMALS)
@settings(max_examples=30)
def test_weights_hold_over_the_whole_of_a_long_period(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources, _ = mixture.at(np.arange(min(mixture.period, 20_000)))
    slots = np.arange(1, len(sources) + 1)
    for source, share in enumerate(mixture.weights):
        ahead = np.cumsum(sources == source) * share.denominator - slots * share.numerator
        assert np.abs(ahead).max() < share.denominator


@given(parts=WHOLE, far=st.integers(0, 10**12), length=st.integers(0, 300))
def test_any_stretch_holds_its_share_within_two_and_each_source_goes_on_where_it_was(
    parts: list[int], far: int, length: int
) -> None:
    mixture = Mixture(parts)
    sources, places = mixture.at(np.arange(far, far + length))
    before, after = mixture.taken(far), mixture.taken(far + length)
    for source, part in enumerate(parts):
        mine = places[sources == source]
        assert mine.tolist() == list(range(before[source], after[source]))
        assert abs(len(mine) - Fraction(part, sum(parts)) * length) < 2
    assert before.sum() == far


@given(parts=WHOLE, slots=st.lists(st.integers(0, 10**12), max_size=30))
def test_slots_are_independent_of_how_they_are_asked_for(parts: list[int], slots: list[int]) -> None:
    sources, places = Mixture(parts).at(np.array(slots, dtype=np.int64))
    fresh = Mixture(parts)
    for slot, source, place in zip(slots, sources.tolist(), places.tolist(), strict=True):
        assert [part.tolist() for part in fresh.at(np.array([slot]))] == [[source], [place]]
        taken = fresh.taken(slot + 1) - fresh.taken(slot)
        assert taken[source] == taken.sum() == 1
        assert fresh.taken(slot)[source] == place


@given(parts=WHOLE)
def test_the_schedule_is_that_of_the_earliest_deadline(parts: list[int]) -> None:
    total, done, expected = sum(parts), [0] * len(parts), []
    for slot in range(total):  # written out: the open sample that must come first, of those that may come already
        open_now = [source for source, part in enumerate(parts) if done[source] * total // part <= slot]
        source = min(open_now, key=lambda source: (-(-(done[source] + 1) * total // parts[source]), source))
        done[source] += 1
        expected.append(source)
    assert Mixture(parts).at(np.arange(total))[0].tolist() == expected


@given(weights=st.lists(st.floats(0.02, 100), min_size=1, max_size=6))
@settings(max_examples=25)
def test_weights_without_a_small_denominator_are_rounded_by_less_than_the_resolution(weights: list[float]) -> None:
    mixture = Mixture(weights)
    shares = [Fraction(str(weight)) / sum(Fraction(str(each)) for each in weights) for weight in weights]
    assert sum(mixture.weights) == 1
    if lcm(*(share.denominator for share in shares)) <= LONGEST_PERIOD:
        assert mixture.weights == shares
    assert all(
        abs(used - share) < Fraction(1, LONGEST_PERIOD) for used, share in zip(mixture.weights, shares, strict=True)
    )
    assert mixture.period <= LONGEST_PERIOD


@pytest.mark.parametrize(
    ("weights", "effective"),
    [
        ([0.7, 0.3], ["7/10", "3/10"]),
        ([70, 30], ["7/10", "3/10"]),
        ([0.1, 0.2, 0.3, 0.4], ["1/10", "1/5", "3/10", "2/5"]),
        ([1 / 3, 1 / 3, 1 / 3], ["1/3", "1/3", "1/3"]),
        ([5], ["1"]),
        ([0.0001, 0.9999], ["1/10000", "9999/10000"]),
        ([0.000_02, 0.999_98], ["1/50000", "49999/50000"]),
    ],
)
def test_weights_are_taken_as_they_are_written(weights: list[float], effective: list[str]) -> None:
    assert [str(weight) for weight in Mixture(weights).weights] == effective


def test_sources_of_equal_weight_take_turns() -> None:
    assert Mixture([1, 1, 1]).at(np.arange(6))[0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("weights", [[0, 1], [-1, 2], [float("nan")], [float("inf"), 1]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="positive number"):
        Mixture(weights)


def test_a_weight_too_small_for_the_period_is_refused() -> None:
    with pytest.raises(UserError, match="weight 1e-07 is less than 1/65536"):
        Mixture([0.3, 0.699_999_9, 1e-7])


def test_slots_before_the_start_are_refused() -> None:
    with pytest.raises(IndexError, match="start at 0"):
        Mixture([1, 2]).at(np.array([-1]))


def test_the_schedule_never_changes() -> None:
    # Runs in progress resume into it: a change here breaks every one of them.
    sources, places = Mixture([5, 3, 2]).at(np.arange(98, 112))
    assert sources.tolist() == [0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]
    assert places.tolist() == [49, 19, 50, 30, 51, 20, 52, 31, 53, 32, 54, 21, 55, 33]
