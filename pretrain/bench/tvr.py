"""What one application of TVR costs, for both engines, as a share of a training step, by ranks and model size."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from pretrain.bench.table import render

SIZES = [(128, 4), (256, 8), (384, 8)]  # hidden size, layers


def bench_tvr(world_sizes: tuple[int, ...], rounds: int) -> str:
    """A table; within each row step, sharded and gathered engine are interleaved `rounds` times, medians reported."""
    rows = []
    for world_size in world_sizes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += ["-m", "pretrain.bench.tvr_worker", json.dumps(SIZES), str(rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the ranks failed:\n{done.stdout}{done.stderr}")
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    header = (
        "ranks",
        "parameters",
        "step ms",
        "sharded ms",
        "gathered ms",
        "sharded / step",
        "gathered / step",
        "gathered / sharded",
    )
    cells = [
        (
            row["ranks"],
            f"{row['parameters'] / 1e6:.1f}M",
            1e3 * row["step"],
            1e3 * row["sharded"],
            1e3 * row["gathered"],
            f"{row['sharded'] / row['step']:.2%}",
            f"{row['gathered'] / row['step']:.2%}",
            row["gathered"] / row["sharded"],
        )
        for row in rows
    ]
    return render(header, cells)
