"""Whole runs that start from a DeepSpeed universal checkpoint, or refuse one that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.folders import find_start
from pretrain.checkpoints.stored import universal_weights
from pretrain.errors import UserError
from pretrain.export.universal import export_universal
from tests.support.runs import arguments, assert_refused, events, losses, run_ranks, run_together, status


class Unsafe:
    """An object that a file could only bring by running code."""

    def __reduce__(self) -> tuple:
        return (print, ("code from the file was run",))


STEPS = 4  # before the universal checkpoint


@pytest.fixture(scope="module")
def universal(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the universal checkpoint of a run on one rank that keeps an average of its weights."""
    base = tmp_path_factory.mktemp("universal")
    settings = {"out": str(base), "name": "whole", "steps": STEPS, "ema.decay": 0.9}
    assert run_ranks(arguments(run_file, settings), base / "logs", 1).code == 0
    lines: list[str] = []
    exported = export_universal(base / "whole/checkpoints/latest", base / "universal", lines.append)
    assert lines == ["the average of the weights is left out: a universal checkpoint has no place for it"]
    assert {file.stem for file in exported.glob("zero/*/*.pt")} == {"fp32", "exp_avg", "exp_avg_sq", "step"}
    return exported


def test_a_run_with_another_optimizer_is_not_exported(run_file: Path, tmp_path: Path) -> None:
    settings = {"out": str(tmp_path), "name": "lion", "steps": 2, "optim.name": "lion", "ema.decay": 0.9}
    assert run_ranks(arguments(run_file, settings), tmp_path / "logs", 1).code == 0
    with pytest.raises(UserError, match=r"holds exp_avg of .*two moments of Adam only"):
        export_universal(tmp_path / "lion/checkpoints/latest", tmp_path / "universal", print)
    assert not (tmp_path / "universal").exists()


def test_a_run_starts_from_a_universal_checkpoint_or_refuses_it(
    run_file: Path, universal: Path, tmp_path: Path
) -> None:
    def from_there(name: str, **more: object) -> tuple[list[str], int]:
        settings = {"out": str(tmp_path), "name": name, "checkpoint.resume": str(universal.parent), "steps": 2 * STEPS}
        return arguments(run_file, settings | more), 1

    ended = run_together(
        {
            "goes on": from_there("next"),
            "too short": from_there("short", steps=STEPS - 1),
            "another model": from_there("wider", **{"model.intermediate_size": 24}),
            "another optimizer": from_there("muon", **{"optim.name": "muon", "optim.grad_clip": None}),
        },
        tmp_path / "logs",
    )
    assert ended["goes on"].code == 0, ended["goes on"].stderr
    assert "continuing another trainer's run after 4 steps" in ended["goes on"].stdout
    folder = tmp_path / "next"
    assert [event["step"] for event in events(folder, "resumed")] == [STEPS]
    assert min(losses(folder)) == STEPS + 1
    assert status(folder)["status"] == "finished"
    state = json.loads((folder / f"checkpoints/step_{2 * STEPS:08d}/trainer.json").read_text())
    assert state["samples"] == STEPS * state["global_batch_size"]  # from the first sample on
    assert_refused(ended["too short"], "trained 4 steps", "asks for 3")
    assert_refused(ended["another model"], "mlp", "shape")
    held = "the checkpoint holds exp_avg, exp_avg_sq of model.layers.0."
    assert_refused(ended["another optimizer"], held, "keeps momentum_buffer: it is another optimizer's")
    assert not list(tmp_path.glob("*/checkpoints/step_00000004"))


def without_a_weight(folder: Path) -> None:
    shutil.rmtree(next((folder / "zero").glob("*down_proj*")))


def of_muon(folder: Path) -> None:
    one = next((folder / "zero").glob("*q_proj*"))
    (one / "exp_avg.pt").rename(one / "momentum_buffer.pt")


def unsafe(folder: Path) -> None:
    torch.save({"param": Unsafe()}, next((folder / "zero").glob("*q_proj*")) / "fp32.pt")


def cut_off(folder: Path) -> None:
    file = next((folder / "zero").glob("*q_proj*")) / "exp_avg_sq.pt"
    file.write_bytes(file.read_bytes()[:300])


def in_half_precision(folder: Path) -> None:
    torch.save({"param": torch.zeros(48, 48).half()}, next((folder / "zero").glob("*q_proj*")) / "fp32.pt")


def without_step(folder: Path) -> None:
    state = torch.load(folder / "zero/optimizer_state.pt", weights_only=False)
    del state["optimizer_state_dict"]
    torch.save(state, folder / "zero/optimizer_state.pt")
    for file in folder.glob("zero/*/step.pt"):
        file.unlink()


FAULTS = {
    "a weight missing": (without_a_weight, "lacks the weight"),
    "Muon's": (of_muon, "momentum_buffer"),
    "code in a file": (unsafe, "Nothing in it was run"),
    "cut off": (cut_off, "exp_avg_sq.pt"),
    "half precision": (in_half_precision, "float32 were due"),
    "no step": (without_step, "how many steps"),
    "no counters": (lambda folder: [file.unlink() for file in folder.glob("*model_states.pt")], "no file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_named(
    universal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    damage, *parts = FAULTS[fault]
    folder = tmp_path / "copy"
    shutil.copytree(universal, folder)
    damage(folder)
    with pytest.raises(UserError, match="|".join(parts)):
        universal_weights(folder)
    assert "was run" not in capsys.readouterr().out


def test_latest_universal_names_the_checkpoint_beside_it(universal: Path, tmp_path: Path) -> None:
    assert find_start(universal.parent) == find_start(universal) == universal
    for name in ("../elsewhere", "absent"):
        (tmp_path / "latest_universal").write_text(name)
        with pytest.raises(UserError, match="no universal checkpoint beside it"):
            find_start(tmp_path)
