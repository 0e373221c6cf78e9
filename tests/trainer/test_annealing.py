"""A run is annealed from a checkpoint of another run, or made longer: the learning rates, what is printed, and the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import arguments, events, last_rows, run_ranks

PEAK = 5e-3  # of the run file
CONSTANT = {"optim.schedule.name": "constant"}


@pytest.fixture(scope="module")
def whole(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of eight steps at a constant rate, with checkpoints of steps 4 and 8."""
    base = tmp_path_factory.mktemp("whole")
    words = arguments(run_file, {"out": str(base), "name": "whole", **CONSTANT})
    assert run_ranks(words, base / "logs").code == 0
    return base / "whole"


def test_a_run_is_annealed_from_a_checkpoint(run_file: Path, whole: Path, tmp_path: Path) -> None:
    settings = {
        "out": str(tmp_path),
        "name": "annealed",
        "steps": 8,
        "optim.schedule": {"name": "wsd", "warmup_steps": 2, "min_lr_ratio": 0.0, "decay_ratio": 0.5},
        "checkpoint.resume": str(whole / "checkpoints/step_00000004"),
    }
    ended = run_ranks(arguments(run_file, settings), tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    rates = [row["lr"] for _, row in sorted(last_rows(tmp_path / "annealed", "train").items())]
    assert rates == pytest.approx([PEAK * (8 - step) / 4 for step in range(5, 9)])
    assert "the learning rate of step 5 is 3.75e-03, by the old schedule 5.00e-03" in ended.stdout
    for step, row in last_rows(tmp_path / "annealed", "train").items():
        before = last_rows(whole, "train")[step]
        assert (row["first_sample"], row["last_sample"]) == (before["first_sample"], before["last_sample"])
        assert (row["loss"] == before["loss"]) == (step == 5)  # the rates differ from the first step on
    assert [event["step"] for event in events(tmp_path / "annealed", "resumed")] == [4]


def test_a_finished_run_is_made_longer(run_file: Path, whole: Path, tmp_path: Path) -> None:
    words = arguments(run_file, {"out": str(whole.parent), "name": "whole", "steps": 10, **CONSTANT})
    ended = run_ranks(words, tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    assert (
        "steps: 8 -> 10: the learning rate of step 9 is 5.00e-03; the old schedule ended with 5.00e-03 at step 8"
        in ended.stdout
    )
    rows = last_rows(whole, "train")
    assert sorted(rows) == list(range(1, 11))
    assert rows[9]["first_sample"] == rows[8]["last_sample"] + 1
