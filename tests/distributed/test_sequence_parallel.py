"""Runs whose ranks share sequences: what they log, save and resume is what runs log whose ranks read sequences of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.runs import arguments, events, last_rows, losses, run_together

STEPS, HALF = 6, 3
CLOCK = ("time", "tokens_per_s", "step_time_s", "data_wait", "memory_bytes", "mfu")


def settings(out: Path, name: str, sequence: int) -> dict:
    """Return a run of a few steps that measures everything at every third step."""
    chosen = {"out": str(out), "name": name, "steps": STEPS, "deepspeed": {"zero_optimization": {"stage": 3}}}
    chosen |= {"parallel.sequence": sequence, "data.micro_batch_size": 2 * sequence}
    chosen |= {"optim.schedule.name": "constant", "optim.schedule.warmup_steps": 0}
    chosen |= {"methods.1.interval_steps": HALF, "checkpoint.interval_steps": HALF, "eval.interval_steps": HALF}
    chosen |= {"log.interval_steps": 1, "log.weights_interval_steps": HALF, "log.activations_interval_steps": HALF}
    return chosen


@pytest.fixture(scope="module")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs `apart` and `sliced`, on two ranks each."""
    out = tmp_path_factory.mktemp("sequence_parallel")
    sizes = {"apart": 1, "sliced": 2}
    commands = {name: (arguments(run_file, settings(out, name, size)), 2) for name, size in sizes.items()}
    assert [ended.code for ended in run_together(commands, out / "logs").values()] == [0, 0]
    return out


def figures(value: object, path: str = "") -> dict[str, float]:
    """Return the numbers of a row by their place in it, without those of the clock."""
    if isinstance(value, dict):
        parts = [(key, each) for key, each in value.items() if key not in CLOCK]
    elif isinstance(value, list):
        parts = list(enumerate(value))
    else:
        return {path: value} if isinstance(value, int | float) else {}
    return {place: number for key, each in parts for place, number in figures(each, f"{path}/{key}").items()}


@pytest.mark.parametrize("kind", ["train", "eval", "weights", "activations"])
def test_every_row_is_that_of_ranks_which_read_sequences_of_their_own(trained: Path, kind: str) -> None:
    found, expected = (last_rows(trained / name, kind) for name in ("sliced", "apart"))
    assert found.keys() == expected.keys()
    assert len(found) == (STEPS if kind == "train" else 2)
    for step, row in expected.items():
        assert figures(found[step]) == pytest.approx(figures(row), rel=2e-4, abs=1e-6), step


@pytest.fixture(scope="module")
def resumed(run_file: Path, trained: Path) -> Path:
    """Return the folder of runs that resume from step 3: `sliced` as it was, apart and on one rank, `apart` sliced."""
    plans = {"again": ("sliced", 2, 2), "joined": ("sliced", 1, 2), "alone": ("sliced", 1, 1), "cut": ("apart", 2, 2)}
    commands = {}
    for name, (source, size, ranks) in plans.items():
        place = f"checkpoints/step_{HALF:08d}"
        shutil.copytree(trained / source / place, trained / name / place)
        commands[name] = (arguments(run_file, settings(trained, name, size)), ranks)
    ended = run_together(commands, trained / "resumed_logs")
    assert [each.code for each in ended.values()] == [0] * len(plans), ended
    return trained


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(resumed: Path) -> None:
    expected = losses(resumed / "sliced")
    assert losses(resumed / "again") == {step: expected[step] for step in range(HALF + 1, STEPS + 1)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "like"), [("joined", "sliced"), ("alone", "sliced"), ("cut", "apart")])
def test_a_run_resumes_with_another_number_of_slices(resumed: Path, name: str, like: str) -> None:
    assert [event["step"] for event in events(resumed / name, "resumed")] == [HALF]
    found, expected = losses(resumed / name), losses(resumed / like)
    assert list(found) == list(range(HALF + 1, STEPS + 1))
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-6)


def test_the_plan_names_the_slices_and_counts_batches(trained: Path) -> None:
    said = (trained / "sliced/log.txt").read_text()
    assert "8 sequences of 32 = 1 data-parallel ranks x 2 micro-batches of 4" in said
    assert "2 ranks share a sequence" in said
