"""A run with compiled blocks, from the command line to a proved export, with Inductor's own rounding of bf16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpoints.logit_probe import load_probe
from tests.support.runs import TRAIN, Ended, arguments, launch, rows

BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def train(run_file: Path, out: Path, name: str, **settings: object) -> Ended:
    keys = {"out": str(out), "name": name, "deepspeed": BF16, "checkpoint.interval_steps": 4, **settings}
    return launch(["python", TRAIN, *arguments(run_file, keys)])


@pytest.mark.slow
@pytest.mark.parametrize("methods", [["lir"], ["wesar"]])
def test_a_compiled_run_is_resumed_converted_and_proved(run_file: Path, tmp_path: Path, methods: list[str]) -> None:
    settings = {"methods": [{"name": name} for name in methods], "compile": "layers", "optim.lr": 5e-4}
    ended = train(run_file, tmp_path, "run", **settings)
    assert ended.code == 0, ended.stderr
    assert "blocks    compiled" in ended.stdout
    assert json.loads((tmp_path / "run/environment.json").read_text())["blocks"] == "compiled"
    checkpoint = tmp_path / "run/checkpoints/step_00000008"
    converted = launch(
        ["python", "tools/convert_to_hf.py", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "hf")]
    )
    assert converted.code == 0, converted.stderr
    assert "rounding" in converted.stdout

    eager = train(run_file, tmp_path, "eager", **settings | {"compile": "off"})
    assert "blocks    eager (compile is off)" in eager.stdout
    compiled_losses, eager_losses = (
        [row["loss"] for row in rows(tmp_path / name, "train")] for name in ("run", "eager")
    )
    assert compiled_losses == pytest.approx(eager_losses, rel=5e-3)
    logits = [load_probe(tmp_path / name / "checkpoints/step_00000008")[1] for name in ("run", "eager")]
    assert not logits[0].equal(logits[1]), "the probe of the compiled run is computed by the compiled blocks"

    middle = str(tmp_path / "run/checkpoints/step_00000004")
    resumed = train(run_file, tmp_path, "resumed", **settings, **{"checkpoint.resume": middle})
    assert resumed.code == 0, resumed.stderr
    assert "blocks: " not in resumed.stdout
    again = [row["loss"] for row in rows(tmp_path / "resumed", "train")]
    assert again == compiled_losses[-len(again) :]
