"""The state of methods survives a kill, and changes once a step however often forward runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.method_state import read_method_state
from pretrain.checkpoints.stored import master_weights
from tests.support.runs import (
    TRAIN,
    arguments,
    events,
    free_port,
    last_rows,
    launch,
    losses,
    run_ranks,
    start_ranks,
    wait_until,
)
from tests.support.selection import slow_but

STEPS = 7
# Two micro-batches a rank, each block's forward run again in backward, no weight resident, evaluations between steps.
SETTINGS = {
    "steps": STEPS,
    "deepspeed": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
    "activation_checkpointing": True,
    "eval.interval_steps": 2,
}


def settings(out: Path, name: str, method: str, interval: int) -> dict:
    run = {"out": str(out), "name": name, "methods": [{"name": method}]}
    return SETTINGS | run | {"checkpoint.interval_steps": interval, "checkpoint.keep_last": STEPS}


@pytest.fixture(scope="module", params=slow_but(["sigma_reparam"], ["sigma_reparam", "wesar"]))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(run_file: Path, tmp_path_factory: pytest.TempPathFactory, method: str) -> Path:
    """A run that is not killed.

    That of wesar comes from a launcher: its ranks hash strings differently, which those of one fork server do not, and
    must exchange the factors in the same order all the same.
    """
    out = tmp_path_factory.mktemp(method)
    if method == "wesar":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        ended = launch([*launcher, TRAIN, *arguments(run_file, settings(out, "whole", method, interval=3))])
    else:
        ended = run_ranks(arguments(run_file, settings(out, "whole", method, interval=1)), out / "logs")
    assert ended.code == 0, ended.stderr
    return out / "whole"


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoints/step_{step:08d}"


def masters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {name: load() for name, load in master_weights(checkpoint(folder, step) / "deepspeed").items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not(
    run_file: Path, whole: Path, method: str, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    words = arguments(run_file, settings(tmp_path, "killed", method, interval=3))
    with start_ranks(words, tmp_path / "logs") as job:
        wait_until(lambda: max(losses(killed), default=0) in (4, 5), job)
        job.signal(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
    assert run_ranks(words, tmp_path / "logs").code == 0
    assert [event["step"] for event in events(killed, "resumed")] == [3]
    assert losses(killed) == losses(whole)
    for step in (4, 6):
        assert last_rows(killed, "eval")[step]["loss"] == last_rows(whole, "eval")[step]["loss"]
    assert_same_tensors(masters(killed, STEPS), masters(whole, STEPS))
    assert_same_tensors(read_method_state(checkpoint(killed, STEPS)), read_method_state(checkpoint(whole, STEPS)))


@pytest.mark.parametrize("method", ["sigma_reparam"], indirect=True, scope="module")
def test_singular_vectors_take_one_iteration_a_step_on_the_weights_before_it(whole: Path, method: str) -> None:
    """Compare the states of two checkpoints by the formula."""
    for step in range(1, STEPS):
        weights, before = masters(whole, step), read_method_state(checkpoint(whole, step))
        after = read_method_state(checkpoint(whole, step + 1))
        assert len(after) == 2 * 7 * 2  # blocks x matrices x vectors
        for name in (name.removesuffix(".left_singular_vector") for name in after if ".left" in name):
            matrix = weights[f"{name}.weight"].bfloat16().double()  # as forward saw it
            right = matrix.T @ before[f"{name}.left_singular_vector"].double()
            right /= right.norm()
            left = matrix @ right
            left /= left.norm()
            torch.testing.assert_close(after[f"{name}.right_singular_vector"], right.float(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(after[f"{name}.left_singular_vector"], left.float(), rtol=1e-5, atol=1e-7)
            assert (left - before[f"{name}.left_singular_vector"]).norm() > 1e-3, "an iteration is noticeable"
