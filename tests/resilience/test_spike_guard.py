"""The guard's decisions against standard deviations by numpy, without ranks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from pretrain.config.schema import GuardSection
from pretrain.resilience.spike_guard import SpikeGuard, StepVerdict

NAN, INF = float("nan"), float("inf")


def guard_of(**config) -> SpikeGuard:
    return SpikeGuard(GuardSection(**{"spikes": "skip", "window_steps": 16, **config}))


def day(number: int) -> tuple[float, float]:
    """Return loss and gradient norm of an uneventful step."""
    noise = random.Random(number)
    return 3.0 + noise.gauss(0, 0.1), 1.0 + noise.gauss(0, 0.05)


def after(guard: SpikeGuard, steps: int) -> SpikeGuard:
    for step in range(1, steps + 1):
        assert guard.assess(step, *day(step)).kind == "fine"
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (3.0, NAN, "the gradient norm is nan"),
        (3.0, INF, "the gradient norm is inf"),
        (NAN, None, "the loss is nan"),
    ],
)
@pytest.mark.parametrize("spikes", ["report", "skip"])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss, norm, reason, spikes) -> None:
    assert guard_of(spikes=spikes).assess(1, loss, norm) == StepVerdict("not finite", skip=True, reason=reason)


@pytest.mark.parametrize("of", ["loss", "gradient norm"])
@pytest.mark.parametrize("sigma", [3.0, 6.0])
def test_a_spike_is_what_lies_sigma_standard_deviations_above_the_mean_of_the_window(of: str, sigma: float) -> None:
    column = ("loss", "gradient norm").index(of)
    window = np.array([day(step)[column] for step in range(5, 21)])  # the last 16 of 20
    threshold = window.mean() + sigma * window.std(ddof=1)

    def judged(value: float) -> StepVerdict:
        seen = [3.0, 1.0]
        seen[column] = value
        return after(guard_of(sigma=sigma), 20).assess(21, *seen)

    assert judged(threshold * (1 - 1e-9)).kind == "fine"
    verdict = judged(threshold * (1 + 1e-9))
    assert (verdict.kind, verdict.skip) == ("spike", True)
    for part in (f"the {of} is {threshold:.6g}", f"{window.mean():.6g}", f"{window.std(ddof=1):.3g}", "last 16 steps"):
        assert part in verdict.reason


def test_a_value_far_below_the_mean_is_no_spike() -> None:
    assert after(guard_of(), 16).assess(17, 0.0, 0.0).kind == "fine"


def test_there_is_no_verdict_on_spikes_before_the_window_is_half_full() -> None:
    assert after(guard_of(), 7).assess(8, 1e6, 1e6).kind == "fine"
    assert after(guard_of(), 8).assess(9, 1e6, 1e6).kind == "spike"


def test_without_gradient_norms_losses_are_judged_alone() -> None:
    guard = guard_of()
    for step in range(1, 17):
        assert guard.assess(step, day(step)[0], None).kind == "fine"
    assert guard.assess(17, 30.0, None).reason.startswith("the loss is 30,")


def test_only_steps_that_were_taken_enter_the_window() -> None:
    spared, harmed = after(guard_of(), 20), after(guard_of(), 20)
    for step in range(21, 26):
        harmed.assess(step, 50.0, 9.0)
    assert harmed.state()["windows"] == spared.state()["windows"]
    reporting = after(guard_of(spikes="report"), 20)
    assert reporting.assess(21, 50.0, 9.0) == StepVerdict("spike", False, harmed.assess(26, 50.0, 9.0).reason)
    assert reporting.state()["windows"]["loss"][-1] == 50.0


def test_a_rollback_is_due_after_so_many_skips_in_a_row() -> None:
    guard = after(guard_of(max_skips=3), 16)
    guard.assess(17, NAN, 1.0)
    guard.assess(18, 50.0, 1.0)
    assert (guard.streak, guard.streak_start, guard.must_go_back(last=False)) == (2, 17, False)
    assert guard.must_go_back(last=True), "no later step can show that it passes"
    guard.assess(19, *day(19))
    assert (guard.streak, guard.streak_start) == (0, None)
    for step in (20, 21, 22):
        assert not guard.must_go_back(last=False)
        guard.assess(step, NAN, 1.0)
    assert (guard.streak_start, guard.must_go_back(last=False)) == (20, True)


def test_it_gives_up_when_a_rollback_more_than_allowed_is_due() -> None:
    guard = guard_of(max_skips=1, max_rollbacks=2)
    begun = guard.state()
    for rollbacks in (1, 2):
        guard.assess(5, NAN, 1.0)
        assert guard.must_go_back(last=False)
        guard.rolled_back(begun)
        assert (guard.rollbacks, guard.streak, guard.must_go_back(last=False)) == (rollbacks, 0, False)
    guard.assess(5, NAN, 1.0)
    assert guard.rollbacks == guard.config.max_rollbacks


def test_a_guard_that_is_resumed_anywhere_decides_alike_bit_for_bit() -> None:
    days = [day(step) for step in range(1, 61)]
    days[30:33] = [(NAN, 1.0), (40.0, 1.0), (3.0, INF)]
    days[50] = (3.0, 7.0)
    whole = guard_of()
    verdicts = [whole.assess(step, *seen) for step, seen in enumerate(days, start=1)]
    assert [step for step, verdict in enumerate(verdicts, start=1) if verdict.skip] == [31, 32, 33, 51]
    for stop in range(1, 60, 7):
        killed = guard_of()
        for step, seen in enumerate(days[:stop], start=1):
            killed.assess(step, *seen)
        resumed = guard_of()
        resumed.load_state(json.loads(json.dumps(killed.state(), allow_nan=False)))
        assert [resumed.assess(step, *days[step - 1]) for step in range(stop + 1, 61)] == verdicts[stop:]
        assert resumed.state() == whole.state()


def test_a_shorter_window_takes_the_newest_values_and_no_state_is_that_of_a_new_run() -> None:
    long, short = after(guard_of(), 20), guard_of(window_steps=8)
    short.load_state(long.state())
    assert short.state()["windows"]["loss"] == [day(step)[0] for step in range(13, 21)]
    short.load_state({})
    assert short.state() == guard_of().state()
