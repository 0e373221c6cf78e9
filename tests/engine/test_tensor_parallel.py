"""Tensor parallelism changes only the place of the work: losses, norms and weights are the same; runs resume and convert."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.stored import master_weights
from pretrain.errors import UserError
from pretrain.export.convert import convert
from tests.support.runs import (
    arguments,
    events,
    last_rows,
    losses,
    run_ranks,
    start_ranks,
    wait_until,
)

STEPS = 4
# Shares of odd size, biases of both kinds (cut with their matrix, whole on every rank), grouped heads.
MODEL = {
    "family": "llama",
    "hidden_size": 40,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
BF16 = {"bf16": {"enabled": True}}


@dataclass(frozen=True)
class Layout:
    """A layout: ranks, how many of them hold one copy of the model, DeepSpeed's JSON, and the run without it to compare with."""

    ranks: int
    tensor: int
    deepspeed: dict
    model: dict = field(default_factory=lambda: MODEL)
    like: str = "data2"
    tolerance: float = 1e-6


def zero(stage: int, **keys: object) -> dict:
    return {"zero_optimization": {"stage": stage, **keys}}


TIED = MODEL | {"tie_word_embeddings": True}
ALONE = {
    "data2": Layout(2, 1, zero(1)),
    "data2_bf16": Layout(2, 1, BF16 | zero(1)),
    "data2_tied": Layout(2, 1, zero(1), TIED),
}
CUT = {
    "zero3": Layout(4, 2, zero(3)),
    "zero3_nothing_resident_tied": Layout(2, 2, zero(3, stage3_param_persistence_threshold=0), TIED, "data2_tied"),
    "zero2": Layout(4, 2, zero(2)),
    "zero1_bf16": Layout(4, 2, BF16 | zero(1), like="data2_bf16", tolerance=2e-3),
    "stage0": Layout(4, 2, zero(0)),
}
SLOW = {
    "zero1": Layout(4, 2, zero(1)),
    "zero3_bf16": Layout(4, 2, BF16 | zero(3), like="data2_bf16", tolerance=2e-3),
    "zero2_round_robin_tied": Layout(4, 2, zero(2, round_robin_gradients=True), TIED, "data2_tied"),
    "stage0_one_reader": Layout(2, 2, zero(0)),
    "zero3_offloaded": Layout(4, 2, zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})),
    "zero2_offloaded": Layout(4, 2, zero(2, offload_optimizer={"device": "cpu"})),
}
EVERY = [*CUT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def settings(out: Path, name: str, layout: Layout, **more: object) -> dict:
    """Return a run of a few steps that rescales at every second step and measures every weight."""
    chosen = {"out": str(out), "name": name, "steps": STEPS, "model": layout.model, "deepspeed": layout.deepspeed}
    chosen |= {"parallel.tensor": layout.tensor, "methods.1.interval_steps": 2, "log.weights_interval_steps": 2}
    return chosen | more


@pytest.fixture(scope="module")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the run folder of a layout. Trains at the first call."""
    out = tmp_path_factory.mktemp("tensor_parallel")
    made: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in made:
            layout = (ALONE | CUT | SLOW)[name]
            words = arguments(run_file, settings(out, name, layout))
            assert run_ranks(words, out / "logs" / name, layout.ranks).code == 0
            made[name] = out / name
        return made[name]

    return train


def checkpoint_of(folder: Path) -> Path:
    return folder / f"checkpoints/step_{STEPS:08d}"


@pytest.mark.parametrize("name", EVERY)
def test_losses_gradients_and_weights_are_those_of_data_parallel_ranks_alone(trained, name: str) -> None:
    layout = (CUT | SLOW)[name]
    ours, theirs = trained(name), trained(layout.like)

    def same(value: float) -> object:
        return pytest.approx(value, rel=layout.tolerance)

    assert list(losses(ours).values()) == same(list(losses(theirs).values()))
    for kind, keys in (("train", ["grad_norm"]), ("eval", ["loss"])):
        for step, row in last_rows(theirs, kind).items():
            found = last_rows(ours, kind)[step]
            expected = {key: same(row[key]) for key in keys}
            assert {key: found[key] for key in keys} == expected
    for step, row in last_rows(theirs, "weights").items():
        found = last_rows(ours, "weights")[step]["weights"]
        assert found.keys() == row["weights"].keys()
        for weight, values in row["weights"].items():
            # Softmax does not depend on a key's bias. Its gradient is only rounding, which Adam makes as large as any other.
            if not weight.endswith("k_proj.bias"):
                assert found[weight]["std"] == pytest.approx(values["std"], rel=50 * layout.tolerance, abs=1e-7), weight
                assert found[weight]["rescaled"] == values["rescaled"], weight
    assert len(last_rows(theirs, "weights")) == 2


@pytest.mark.parametrize("name", EVERY)
def test_every_layout_converts_to_the_weights_of_the_run_without(trained, name: str, tmp_path: Path) -> None:
    layout = (CUT | SLOW)[name]
    assert convert(checkpoint_of(trained(name)), tmp_path / "hf").proof.holds
    found, expected = (
        master_weights(checkpoint_of(folder) / "deepspeed") for folder in (trained(name), trained(layout.like))
    )
    assert found.keys() == expected.keys()
    for weight in expected:
        whole = expected[weight]()
        assert found[weight].shape == whole.shape
        difference = (found[weight]() - whole).norm() / whole.norm().clamp_min(1e-3)
        assert difference < 1e3 * layout.tolerance, f"{weight} differs by {difference}"


def test_the_ranks_of_a_group_draw_the_same_random_numbers_and_the_groups_others(trained) -> None:
    states = [
        torch.load(checkpoint_of(trained("zero2")) / f"rng_rank_{rank}.pt", weights_only=False)["torch"]
        for rank in range(4)
    ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])
    assert not torch.equal(states[0], states[2])


def test_a_missing_tensor_parallel_rank_is_named(trained, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint_of(trained("zero3")), tmp_path / "copied"))
    for file in (copied / "deepspeed").glob("*mp_rank_01_model_states.pt"):
        file.unlink()
    with pytest.raises(UserError, match=r"no file .*mp_rank_01_model_states"):
        master_weights(copied / "deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", pytest.param("zero1_bf16", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(run_file: Path, tmp_path: Path, name: str) -> None:
    layout = CUT[name]
    more = {"steps": 6, "checkpoint.interval_steps": 2}
    whole = arguments(run_file, settings(tmp_path, "whole", layout, **more))
    assert run_ranks(whole, tmp_path / "logs", layout.ranks).code == 0

    command = arguments(run_file, settings(tmp_path, "killed", layout, **more))
    with start_ranks(command, tmp_path / "logs", layout.ranks) as job:
        wait_until(lambda: max(losses(tmp_path / "killed"), default=0) in (3, 5), job)
        job.signal(signal.SIGKILL)
        job.wait()
    assert run_ranks(command, tmp_path / "logs", layout.ranks).code == 0
    assert [event["step"] in (2, 4) for event in events(tmp_path / "killed", "resumed")] == [True]
    for kind in ("train", "eval", "weights", "activations"):
        found, expected = (last_rows(tmp_path / run, kind) for run in ("killed", "whole"))
        clock = {"time", "tokens_per_s", "step_time_s", "data_wait", "memory_bytes"}
        for step, row in expected.items():
            assert {k: v for k, v in found[step].items() if k not in clock} == {
                k: v for k, v in row.items() if k not in clock
            }


def test_the_plan_counts_groups_that_read_batches_of_their_own(run_file: Path, tmp_path: Path) -> None:
    words = arguments(run_file, settings(tmp_path, "planned", CUT["zero3"]), "--dry-run")
    said = run_ranks(words, tmp_path / "logs", ranks=2).stdout
    assert "8 sequences of 32 = 1 data-parallel ranks x 4 micro-batches of 2" in said
    assert "2 tensor-parallel ranks" in said
