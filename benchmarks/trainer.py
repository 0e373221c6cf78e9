"""Compare the trainer with other trainers on the same task: tokens/s on the same cores, interleaved, on 1 and 2 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rivals import missing_modules
from benchmarks.table import render
from pretrain.paths import REPOSITORY
from pretrain.processes import own_package

TRAIN = REPOSITORY / "pretrain/train.py"
NEEDS = {"hf_trainer": [("accelerate", "accelerate")]}  # modules beyond Evenkeel's own, and pip's names for them
NAMES = {
    "raw_deepspeed": "DeepSpeed in a plain loop",
    "fsdp2": "FSDP2",
    "hf_trainer": "Hugging Face Trainer, DeepSpeed",
}


def bench_trainer(config: str, rounds: int, steps: int, settings: list[str]) -> str:
    """Return a table of the median tokens/s of every trainer.

    Each of the `rounds` rounds runs every trainer once for `steps` steps, one after the other.

    Args:
        settings: "KEY=VALUE" overrides of the run file.

    Raises:
        RuntimeError: If one of them fails.
    """
    trainers = _trainers(config, steps, settings)
    absent = {name: missing for name, needs in NEEDS.items() if (missing := missing_modules(sys.executable, needs))}
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in trainers if key[0] not in absent}
    for number in range(rounds):
        for key, values in speeds.items():
            values.append(trainers[key]())
            print(f"round {number + 1}: {', '.join(key)}: {values[-1]:,.0f} tokens/s", file=sys.stderr)
    reference = median(next(iter(speeds.values())))
    rows: list[tuple[object, ...]] = [
        (
            NAMES.get(name, name),
            where,
            median(values),
            f"{min(values):,.0f}-{max(values):,.0f}",
            median(values) / reference,
        )
        for (name, where), values in speeds.items()
    ]
    rows += [(NAMES[name], "", why, "", "") for name, why in absent.items()]
    return render(("", "on", "tokens/s (median)", "range", "ratio to plain"), rows)


def _trainers(config: str, steps: int, settings: list[str]) -> dict[tuple[str, str], Callable[[], float]]:
    """Return what measures each trainer once, by its name and the processes that it runs on."""
    cores = os.cpu_count() or 1
    whole, half = f"1 process x {cores} threads", f"2 ranks x {max(1, cores // 2)} threads"
    trainers: dict[tuple[str, str], Callable[[], float]] = {
        ("plain PyTorch", whole): partial(_rival, "plain_loop", config, steps, settings, 1)
    }
    for ranks, where in ((1, whole), (2, half)):
        for name in NAMES:
            trainers[name, where] = partial(_rival, name, config, steps, settings, ranks)
        for compiled in ("off", "layers"):
            key = "Evenkeel" if compiled == "off" else "Evenkeel, compile: layers"
            own = [*settings, f"compile={compiled}"]
            trainers[key, where] = partial(_evenkeel, config, steps, own, ranks)
    return trainers


def _rival(name: str, config: str, steps: int, settings: list[str], ranks: int) -> float:
    words = ["-m", f"benchmarks.rivals.{name}", config, str(steps), *settings]
    return float(_run(words, ranks).splitlines()[-1])


def _evenkeel(config: str, steps: int, settings: list[str], ranks: int) -> float:
    """Return the median tokens/s in the run's metrics after its first third. The run evaluates and saves only at its end."""
    with tempfile.TemporaryDirectory() as out:
        never = [f"{key}.interval_steps=1000000" for key in ("eval", "checkpoint")]
        own = [f"out={out}", f"steps={steps}", "log.interval_steps=1", "optim.schedule.warmup_steps=0", *never]
        sets = [word for setting in (*settings, *own) for word in ("--set", setting)]
        _run([str(TRAIN), "--config", config, *sets], ranks)
        rows: list[dict[str, Any]] = [
            json.loads(line)
            for path in Path(out).glob("*/metrics.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
    speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    return median(speeds[steps // 3 :])


def _run(words: list[str], ranks: int) -> str:
    """Return what the ranks of a program print, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    environment = {**os.environ, **own_package(), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
