"""fp16: it learns as fp32 does, a gradient that overflows skips a step and nothing else, and the loss scale resumes.

DeepSpeed's CPU accelerator says that it has no fp16; the ranks of these tests make it say that it has.
"""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pretrain.export.convert import convert
from tests.support.runs import (
    allow_fp16_on_cpu,
    arguments,
    events,
    last_rows,
    losses,
    rows,
    run_ranks,
    start_ranks,
    status,
    wait_until,
)
from tests.support.selection import slow_but

STEPS = 10
LAYOUTS = {
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "stage0": {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp16"}},
}
FAST = ("zero3", "stage0")
EVERY = slow_but(FAST, LAYOUTS)
# Starts too high, so that the first steps overflow, and grows again after a few good ones.
OVERFLOWING = {"enabled": True, "initial_scale_power": 19, "hysteresis": 1, "loss_scale_window": 2}


def settings(out: Path, name: str, layout: str, fp16: dict, **more: object) -> dict:
    chosen = {"out": str(out), "name": name, "steps": STEPS, "deepspeed": LAYOUTS[layout] | {"fp16": fp16}}
    return chosen | {"checkpoint.interval_steps": 3, "log.weights_interval_steps": 1} | more


@pytest.fixture(scope="module")
def fp32(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp32")
    words = arguments(run_file, {"out": str(out), "name": "run", "steps": STEPS})
    assert run_ranks(words, out / "logs").code == 0
    return out / "run"


@pytest.fixture(scope="module")
def overflowed(run_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the folder of a run whose first steps overflow. It trains at the first call."""
    out = tmp_path_factory.mktemp("fp16")
    made: dict[str, Path] = {}

    def train(layout: str) -> Path:
        if layout not in made:
            words = arguments(run_file, settings(out, layout, layout, OVERFLOWING))
            assert run_ranks(words, out / "logs" / layout, prepare=allow_fp16_on_cpu).code == 0
            made[layout] = out / layout
        return made[layout]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("layout", EVERY)
def test_fp16_learns_as_fp32_does(run_file: Path, fp32: Path, tmp_path: Path, layout: str) -> None:
    words = arguments(run_file, settings(tmp_path, "run", layout, {"enabled": True, "initial_scale_power": 14}))
    assert run_ranks(words, tmp_path / "logs", prepare=allow_fp16_on_cpu).code == 0
    for step, expected in last_rows(fp32, "train").items():
        found = last_rows(tmp_path / "run", "train")[step]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert (found["loss_scale"], found["skipped"]) == (2.0**14, 0)
    assert "loss_scale" not in last_rows(fp32, "train")[1]


@pytest.mark.parametrize("layout", EVERY)
def test_an_overflow_skips_the_step_halves_the_scale_and_is_no_error(overflowed, layout: str) -> None:
    folder = overflowed(layout)
    found = list(last_rows(folder, "train").values())
    changes = [row["weights"]["model.layers.0.mlp.up_proj.weight"]["update_ratio"] for row in rows(folder, "weights")]
    skipped_before = 0
    for row, change, after in zip(found, changes, [*found[1:], None], strict=True):
        was_skipped = row["skipped"] > skipped_before
        assert row["skipped"] == skipped_before + was_skipped
        assert (row["grad_norm"] is None) == was_skipped
        assert (change == 0.0) == was_skipped
        if was_skipped and after is not None:
            assert after["loss_scale"] == row["loss_scale"] / 2
        skipped_before = row["skipped"]
    assert 0 < skipped_before < STEPS / 2
    assert found[0]["loss_scale"] == 2.0**19
    scales = [row["loss_scale"] for row in found]
    assert any(after > before for before, after in pairwise(scales)), "the scale never grew again"
    assert status(folder)["status"] == "finished"
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("layout", EVERY)
def test_a_checkpoint_with_skipped_steps_converts(overflowed, layout: str, tmp_path: Path) -> None:
    made = convert(overflowed(layout) / f"checkpoints/step_{STEPS:08d}", tmp_path / "hf")
    assert made.dtype == torch.float16
    assert made.proof.holds


@pytest.mark.slow
@pytest.mark.parametrize("layout", EVERY)
def test_a_killed_run_resumes_with_its_loss_scale(run_file: Path, overflowed, tmp_path: Path, layout: str) -> None:
    killed = tmp_path / "killed"
    words = arguments(run_file, settings(tmp_path, "killed", layout, OVERFLOWING))
    with start_ranks(words, tmp_path / "logs", prepare=allow_fp16_on_cpu) as job:
        wait_until(lambda: max(losses(killed), default=0) in (4, 5, 7, 8), job)
        job.signal(signal.SIGKILL)
        job.wait()
    assert run_ranks(words, tmp_path / "logs", prepare=allow_fp16_on_cpu).code == 0
    assert events(killed, "resumed")[0]["step"] in (3, 6)
    for step, expected in last_rows(overflowed(layout), "train").items():
        found = last_rows(killed, "train")[step]
        for key in ("loss", "grad_norm", "loss_scale", "skipped"):
            assert found[key] == expected[key], (step, key)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EVERY)
def test_gradients_that_overflow_at_the_smallest_scale_are_skips_of_the_guard(
    run_file: Path, tmp_path: Path, layout: str
) -> None:
    stuck = OVERFLOWING | {"min_loss_scale": 2**19}
    more = {"resilience.guard.max_skips": 2, "resilience.autopsy_steps": 1}
    words = arguments(run_file, settings(tmp_path, "run", layout, stuck, **more))
    assert run_ranks(words, tmp_path / "logs", prepare=allow_fp16_on_cpu).code == 4
    found = events(tmp_path / "run", "not_finite")
    assert [(event["step"], event["reason"]) for event in found] == [
        (1, "the gradient norm is inf"),
        (2, "the gradient norm is inf"),
    ]
    assert "there is no checkpoint from before them" in status(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_fp16_works_with_tensor_parallelism(run_file: Path, overflowed, tmp_path: Path) -> None:
    words = arguments(run_file, settings(tmp_path, "run", "zero3", OVERFLOWING, **{"parallel.tensor": 2}))
    assert run_ranks(words, tmp_path / "logs", ranks=4, prepare=allow_fp16_on_cpu).code == 0
    for step, expected in last_rows(overflowed("zero3"), "train").items():
        found = last_rows(tmp_path / "run", "train")[step]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert (found["loss_scale"], found["skipped"]) == (expected["loss_scale"], expected["skipped"])
    assert convert(tmp_path / f"run/checkpoints/step_{STEPS:08d}", tmp_path / "hf").proof.holds
