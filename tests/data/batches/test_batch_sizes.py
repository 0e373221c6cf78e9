"""Sizes of steps against a plain loop over them."""

from __future__ import annotations

import random

import pytest

from pretrain.data.batches.batch_sizes import BatchSizes

CASES = {
    "constant": BatchSizes.constant(12),
    "slow": BatchSizes(4, 20, 4, 1000.0),
    "fast, skips sizes": BatchSizes(4, 64, 4, 100.0),
    "at once": BatchSizes(8, 16, 8, 0.5),
    "uneven": BatchSizes(2, 9, 1, 333.3),
}


def begins(sizes: BatchSizes, count: int, sample: int = 0) -> list[int]:
    """Return where each step begins, by the definition."""
    found = [sample]
    steps = (sizes.end - sizes.start) // sizes.increment
    for _ in range(count):
        here = found[-1]
        grown = steps if here >= sizes.ramp_samples else int(here / sizes.ramp_samples * steps)
        found.append(here + sizes.start + grown * sizes.increment)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sample", [0, 7, 500])
def test_places_and_steps_are_those_of_a_loop(name: str, sample: int) -> None:
    sizes, expected = CASES[name], begins(CASES[name], 400, sample)
    assert [here + sizes.at(here) for here in expected[:-1]] == expected[1:]
    assert [sizes.after(sample, steps) for steps in range(401)] == expected
    for stop in random.Random(1).sample(range(sample, expected[-1]), 50):
        assert sizes.steps_between(sample, stop) == next(n for n, here in enumerate(expected) if here >= stop)


def test_a_ramp_of_a_real_run_is_counted_without_walking_through_it() -> None:
    sizes = BatchSizes(64, 4032, 64, 10e9 / 2048)
    assert sizes.at(0) == 64
    assert sizes.at(int(10e9 / 2048) + 1) == 4032
    steps = sizes.steps_between(0, int(100e9 / 2048))
    assert sizes.after(0, steps) >= 100e9 / 2048 > sizes.after(0, steps - 1)
