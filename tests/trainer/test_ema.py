"""Whole runs with an average of the weights: resumed, on another layout, converted; and means of checkpoints.

Expected values are made in float64 from what DeepSpeed's own zero_to_fp32 reads of each step's checkpoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.numpy import load_file

from tests.support.runs import REPOSITORY, arguments, last_rows, run_ranks

DECAY, STEPS = 0.7, 8
EVERY_STEP = {"checkpoint.interval_steps": 1, "checkpoint.keep_last": 100}
ZERO1 = {"zero_optimization": {"stage": 1}}


def train(run_file: Path, base: Path, settings: dict, ranks: int = 2) -> str:
    """Train, and return what was printed."""
    words = arguments(run_file, {"out": str(base), "name": "run", **EVERY_STEP, **settings})
    ended = run_ranks(words, base / "logs", ranks)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def convert(checkpoint: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/convert_to_hf.py", "--checkpoint", checkpoint, "--out", out, *options]
    return subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)


def exported(checkpoint: Path, out: Path, *options: object) -> dict[str, np.ndarray]:
    """Convert, and return the weights that were written."""
    done = convert(checkpoint, out, *options)
    assert done.returncode == 0, done.stderr
    assert "proved equal" in done.stdout
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def masters(folder: Path, step: int) -> dict[str, np.ndarray]:
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
    return {name: w.detach().double().numpy() for name, w in found.items()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_allclose(found[name], w, rtol=3e-6, atol=1e-8)


@pytest.fixture(scope="module")
def whole(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of eight steps with LIR and TVR, on two ranks at ZeRO-3."""
    base = tmp_path_factory.mktemp("whole")
    train(run_file, base, {"ema.decay": DECAY})
    return base / "run"


@pytest.fixture(scope="module")
def average(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return the average that the last checkpoint of the run is exported with."""
    return exported(whole / "checkpoints/latest", tmp_path_factory.mktemp("hf") / "ema", "--weights", "ema")


def halved(whole: Path, folder: Path) -> Path:
    """Return a copy of the run as it was at step 4."""
    shutil.copytree(whole, folder)
    for step in range(5, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step_{step:08d}")
    (folder / "checkpoints/latest").write_text("step_00000004\n", encoding="utf-8")
    return folder


def test_the_average_is_that_of_the_weights_after_each_step(whole: Path, average: dict[str, np.ndarray]) -> None:
    expected = masters(whole, 1)
    for step in range(2, STEPS + 1):
        expected = {name: DECAY * expected[name] + (1 - DECAY) * w for name, w in masters(whole, step).items()}
    assert_close(average, expected)


def test_evaluations_report_the_loss_of_the_average(whole: Path) -> None:
    rows = last_rows(whole, "eval")
    assert all(0 < abs(row["average_loss"] - row["loss"]) < 0.5 for row in rows.values())
    assert f"of the average {rows[STEPS]['average_loss']:.4f}" in (whole / "log.txt").read_text(encoding="utf-8")


def test_a_resumed_run_has_the_same_average(
    run_file: Path, whole: Path, average: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = halved(whole, tmp_path / "run")
    train(run_file, tmp_path, {"ema.decay": DECAY})
    found = exported(folder / "checkpoints/latest", tmp_path / "hf", "--weights", "ema")
    assert all(np.array_equal(found[name], w) for name, w in average.items())
    assert {step: row["average_loss"] for step, row in last_rows(folder, "eval").items()} == {
        step: row["average_loss"] for step, row in last_rows(whole, "eval").items()
    }


def test_the_average_continues_on_another_layout(
    run_file: Path, whole: Path, average: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = halved(whole, tmp_path / "run")
    assert "ranks 2 -> 1" in train(run_file, tmp_path, {"ema.decay": DECAY, "deepspeed": ZERO1}, ranks=1)
    found = exported(folder / "checkpoints/latest", tmp_path / "hf", "--weights", "ema")
    for name, w in average.items():
        np.testing.assert_allclose(found[name], w, rtol=1e-4, atol=1e-6)


def test_an_average_is_dropped_or_begun_where_the_run_file_says_so(run_file: Path, whole: Path, tmp_path: Path) -> None:
    folder = halved(whole, tmp_path / "run")
    train(run_file, tmp_path, {"steps": 6})
    refused = convert(folder / "checkpoints/latest", tmp_path / "hf", "--weights", "ema")
    assert refused.returncode == 2
    assert "holds no average of the weights: the run file had no 'ema'" in refused.stderr
    assert not (tmp_path / "hf").exists()
    train(run_file, tmp_path, {"ema.decay": DECAY})
    found = exported(folder / "checkpoints/latest", tmp_path / "hf", "--weights", "ema")
    mine = {step: masters(folder, step) for step in (7, 8)}
    assert_close(found, {name: DECAY * w + (1 - DECAY) * mine[8][name] for name, w in mine[7].items()})


def test_checkpoints_are_averaged_at_conversion(whole: Path, tmp_path: Path) -> None:
    others = [whole / f"checkpoints/step_{step:08d}" for step in (4, 6)]
    found = exported(whole / "checkpoints/latest", tmp_path / "hf", "--average", *others)
    tables = [masters(whole, step) for step in (4, 6, 8)]
    assert_close(found, {name: sum(table[name] for table in tables) / 3 for name in tables[0]})
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert "the mean of those of steps 8, 4, 6" in card


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wesar", "sigma_reparam", "weight_norm", "seednorm"])
def test_averages_of_weights_that_are_folded_are_proved(run_file: Path, tmp_path: Path, method: str) -> None:
    """In bf16, where trained factors are taken in float32."""
    bf16 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    settings = {"ema.decay": DECAY, "steps": 3, "methods": [{"name": method}], "deepspeed": bf16, "optim.lr": 0.02}
    train(run_file, tmp_path, settings)
    checkpoints = tmp_path / "run/checkpoints"
    ema = exported(checkpoints / "latest", tmp_path / "ema", "--weights", "ema", "--dtype", "float32")
    mean = exported(
        checkpoints / "latest", tmp_path / "mean", "--dtype", "float32", "--average", checkpoints / "step_00000002"
    )
    plain = exported(checkpoints / "latest", tmp_path / "plain", "--dtype", "float32")
    assert ema.keys() == mean.keys() == plain.keys()
    assert any(not np.array_equal(ema[name], w) for name, w in plain.items())


def test_what_cannot_be_averaged_is_refused(run_file: Path, whole: Path, tmp_path: Path) -> None:
    train(run_file, tmp_path, {"steps": 1, "model.num_hidden_layers": 1})
    other = tmp_path / "run/checkpoints/latest"
    refused = convert(whole / "checkpoints/latest", tmp_path / "hf", "--average", other)
    assert refused.returncode == 2
    assert "cannot be averaged: their 'model' differ" in refused.stderr
    both = convert(whole / "checkpoints/latest", tmp_path / "hf", "--average", other, "--weights", "ema")
    assert both.returncode == 2
    assert "not allowed with argument" in both.stderr
    assert not (tmp_path / "hf").exists()


def test_the_plan_counts_the_average(run_file: Path, tmp_path: Path) -> None:
    sizes = []
    for settings in ({}, {"ema.decay": DECAY}):
        words = arguments(run_file, {"out": str(tmp_path), "name": "plan", **settings}, "--dry-run")
        ended = run_ranks(words, tmp_path / "logs", 1)
        sizes.append([line for line in ended.stdout.splitlines() if line.startswith(("memory", "disk"))])
    assert "masters and moments and average" in sizes[1][0]
    assert sizes[0] != sizes[1]
