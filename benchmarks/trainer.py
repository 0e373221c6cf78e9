"""Compare the trainer on 1 and 2 ranks with a plain PyTorch loop: tokens/s on the same cores, interleaved."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.table import render
from pretrain.paths import REPOSITORY
from pretrain.processes import own_package

TRAIN = REPOSITORY / "pretrain/train.py"


def bench_trainer(config: str, rounds: int, steps: int) -> str:
    """Return a table of median tokens/s over `rounds` rounds, each of which runs every rival once for `steps` steps.

    Raises:
        RuntimeError: If one of them fails.
    """
    cores = os.cpu_count() or 1
    rivals = {
        f"plain PyTorch, 1 process x {cores} threads": lambda: _plain(config, steps, cores),
        f"Evenkeel, 1 rank x {cores} threads": lambda: _evenkeel(config, steps, 1, cores),
        f"Evenkeel, 2 ranks x {max(1, cores // 2)} threads": lambda: _evenkeel(config, steps, 2, max(1, cores // 2)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name, measure in rivals.items():
            speeds[name].append(measure())
            print(f"round {number + 1}: {name}: {speeds[name][-1]:,.0f} tokens/s", file=sys.stderr)
    reference = statistics.median(next(iter(speeds.values())))
    rows = [
        (
            name,
            statistics.median(values),
            f"{min(values):,.0f}-{max(values):,.0f}",
            statistics.median(values) / reference,
        )
        for name, values in speeds.items()
    ]
    return render(("", "tokens/s (median)", "range", "ratio to plain"), rows)


def _plain(config: str, steps: int, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.plain", config, str(steps)]
    return float(_run(command, threads).splitlines()[-1])


def _evenkeel(config: str, steps: int, ranks: int, threads: int) -> float:
    """Return the median tokens/s in the run's metrics after its first third. The run evaluates and saves only at its end."""
    with tempfile.TemporaryDirectory() as out:
        never = [f"{key}.interval_steps=1000000" for key in ("eval", "checkpoint")]
        settings = [f"out={out}", f"steps={steps}", "log.interval_steps=1", "optim.schedule.warmup_steps=0", *never]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--standalone", str(TRAIN), "--config", config]
        _run([*command, *(word for setting in settings for word in ("--set", setting))], threads)
        rows = [
            json.loads(line)
            for path in Path(out).glob("*/metrics.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
    speeds = [row["tokens_per_s"] for row in rows if row["kind"] == "train"]
    return statistics.median(speeds[steps // 3 :])


def _run(command: list[str], threads: int) -> str:
    environment = {**os.environ, **own_package(), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
