"""The same run under every launcher, the content of its folder, and the folder of a run that is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.runs import (
    TRAIN,
    Ended,
    arguments,
    deepspeed,
    free_port,
    last_rows,
    losses,
    open_process,
    rows,
    run_ranks,
    run_together,
    status,
    torchrun,
    wait_for,
)

STEPS = 6


def srun(words: list[str]) -> list:
    """Return the variables that srun sets, one task per rank. MASTER_PORT comes from the job's number."""
    job = free_port(20000, 29999) - 20000
    common = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 2, "SLURM_STEP_TASKS_PER_NODE": "2"}
    tasks = [common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_ADDR": "127.0.0.1"} for rank in range(2)]
    return [
        open_process([sys.executable, TRAIN, *words], {key: str(value) for key, value in task.items()})
        for task in tasks
    ]


def python(words: list[str]) -> list:
    return [open_process([sys.executable, TRAIN, *words])]


LAUNCHERS = {function.__name__: function for function in (deepspeed, torchrun, srun, python)}


@pytest.fixture(scope="module")
def launched(
    run_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Ended], dict[str, Ended]]:
    """Train the same run under every launcher, in out/<launcher>, and make the same mistake under two."""
    out = tmp_path_factory.mktemp("launched")
    done, refused = {}, {}
    for name, launcher in LAUNCHERS.items():
        settings = {"out": str(out), "name": name, "steps": STEPS, "eval.interval_steps": 4}
        settings["log.wandb.mode"] = "offline" if name == "python" else "disabled"
        good = launcher(arguments(run_file, settings))
        if name in ("deepspeed", "torchrun"):  # these two react to the end of a rank
            wrong = settings | {"name": f"{name}_refused", "data.global_batch_size": 7}
            refused[name] = wait_for(launcher(arguments(run_file, wrong)))
        done[name] = wait_for(good)
    return out, done, refused


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_ends_with_code_0_and_says_so(launched: tuple, name: str) -> None:
    out, done, _ = launched
    assert done[name].code == 0, done[name].stderr
    assert done[name].stdout.count(f"finished at step {STEPS}") == 1
    assert f"step       {STEPS}/{STEPS}" in done[name].stdout
    assert status(out / name) == {"status": "finished", "step": STEPS, "reason": "all steps done"}


def test_every_launcher_gives_the_same_losses_to_the_last_bit(launched: tuple) -> None:
    out = launched[0]
    assert list(losses(out / "deepspeed")) == list(range(1, STEPS + 1))
    assert losses(out / "deepspeed") == losses(out / "torchrun") == losses(out / "srun")
    assert last_rows(out / "deepspeed", "eval")[STEPS]["loss"] == last_rows(out / "srun", "eval")[STEPS]["loss"]


def test_one_rank_gives_the_losses_of_two_to_rounding(launched: tuple) -> None:
    out = launched[0]
    one, two = losses(out / "python"), losses(out / "deepspeed")
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-4)
    validation = [last_rows(out / name, "eval")[STEPS]["loss"] for name in ("python", "deepspeed")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)  # the same tokens on any number of ranks


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_bad_input_is_told_once_through_a_launcher(launched: tuple, name: str) -> None:
    out, _, refused = launched
    masked = name == "torchrun"  # it ends with 1 whatever its ranks end with
    assert refused[name].code == (1 if masked else 2)
    assert refused[name].stderr.count("error: data.global_batch_size 7 is not a multiple") == 1
    assert 'train.py", line' not in refused[name].stdout + refused[name].stderr
    assert not (out / f"{name}_refused").exists()


def test_the_run_folder_holds_what_the_contract_says(launched: tuple) -> None:
    folder = launched[0] / "deepspeed"
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert present == {
        *("config.yaml", "environment.json", "status.json", "metrics.jsonl", "log.txt", "logs", "checkpoints")
    }
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank_1.txt", "pulses"}
    assert (folder / "checkpoints/latest").read_text() == f"step_{STEPS:08d}\n"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        f"step_{STEPS:08d}",
    ]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"].keys() >= {"torch", "deepspeed", "transformers"}
    assert len(environment["ranks"]) == 2
    log = (folder / "log.txt").read_text()
    assert "tvr: std above" in log
    assert "validation loss" in log


def test_the_metrics_hold_the_rows_and_fields_that_the_contract_says(launched: tuple) -> None:
    folder = launched[0] / "deepspeed"
    train = last_rows(folder, "train")
    fields = ("tokens", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "memory_bytes")
    assert all(set(fields) <= row.keys() for row in train.values())
    assert [row["tokens"] for row in train.values()] == [8 * 32 * step for step in range(1, STEPS + 1)]
    assert train[1]["lr"] == pytest.approx(2.5e-3)
    assert list(last_rows(folder, "eval")) == [4, STEPS]
    assert last_rows(folder, "eval")[4].keys() >= {"loss", "perplexity"}
    assert list(last_rows(folder, "weights")) == [3, 6]
    values = last_rows(folder, "weights")[3]["weights"]["model.layers.1.mlp.up_proj.weight"]
    assert values.keys() >= {"std", "mean", "update_ratio", "rescaled"}
    assert list(last_rows(folder, "activations")) == [4, STEPS]
    layers = last_rows(folder, "activations")[4]["layers"]
    assert [layer["layer"] for layer in layers] == [1, 2]
    assert all(layer.keys() >= {"top", "median", "excess_kurtosis"} for layer in layers)
    assert [row["event"] for row in rows(folder, "event")] == [
        "started",
        "checkpoint_saved",
        "checkpoint_saved",
        "finished",
    ]


def test_wandb_offline_leaves_a_run_beside_the_metrics(launched: tuple) -> None:
    assert list((launched[0] / "python/wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture(scope="module")
def variants(launched: tuple, run_file: Path) -> Path:
    """Train the run of `launched` again: from its own config.yaml without its DeepSpeed file, and with recomputed activations."""
    out = launched[0]
    copy = out / "copy.yaml"
    copy.write_text((out / "deepspeed/config.yaml").read_text())
    settings = {"out": str(out), "steps": STEPS, "eval.interval_steps": 4, "name": "recomputed"}
    commands = {
        "reproduced": (arguments(copy, {"name": "reproduced"}), 2),
        "recomputed": (arguments(run_file, settings | {"activation_checkpointing": True}), 2),
    }
    ended = run_together(commands, out / "variant_logs")
    assert [job.code for job in ended.values()] == [0, 0]
    return out


def test_config_yaml_of_the_run_folder_reproduces_the_run(variants: Path) -> None:
    assert losses(variants / "reproduced") == losses(variants / "deepspeed")
    resolved = yaml.safe_load((variants / "deepspeed/config.yaml").read_text())
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == 3, "the DeepSpeed file could change or vanish"
    again = yaml.safe_load((variants / "reproduced/config.yaml").read_text())
    assert again == resolved | {"name": "reproduced"}


def test_activation_checkpointing_does_not_change_the_losses(variants: Path) -> None:
    assert list(losses(variants / "recomputed").values()) == pytest.approx(
        list(losses(variants / "deepspeed").values()), rel=1e-6
    )


def test_a_dry_run_prints_the_plan_and_creates_nothing(run_file: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    words = arguments(run_file, {"out": str(tmp_path / "runs"), "name": "run"}, "--dry-run")
    ended = run_ranks(words, tmp_path.with_name(tmp_path.name + "_logs"))
    assert ended.code == 0
    assert ended.stderr == ""
    for part in (
        "72.4k parameters",
        "8 steps x 256 tokens",
        "2 data-parallel ranks x 2 micro-batches of 2",
        "ZeRO-3, fp32",
        "lir, tvr",
    ):
        assert ended.stdout.count(part) == 1
    assert "tvr: std above 1.1x -> 0.01, every 3 steps" in ended.stdout
    assert set(tmp_path.iterdir()) == before
