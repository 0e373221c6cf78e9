"""Compare conversion with DeepSpeed's own `zero_to_fp32`, in time and peak memory, on one checkpoint.

Each way runs in a process of its own, the ways in turns. Peak memory is the largest resident set that the kernel saw,
so pages of mapped files count. The row `imports alone` shows the cost of Python and the libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.table import render
from pretrain.checkpoints.folders import resolve

# Every program gets the checkpoint and a folder that does not exist yet.
_HEAD = "import sys; from pathlib import Path; checkpoint, out = map(Path, sys.argv[1:]); "
PROGRAMS = {
    "imports alone": "import deepspeed.utils.zero_to_fp32, pretrain.export.convert",
    "evenkeel, weights only": (
        "from pretrain.config.schema import load_config; from pretrain.export.convert import write_model; import torch; "
        "from pretrain.export.sources import source_of; "
        "source = source_of(checkpoint, ema=False, others=()); config = load_config(checkpoint / 'config.yaml'); "
        "out.mkdir(); write_model(checkpoint, source, out, config, torch.float32)"
    ),
    "evenkeel, verified and proved": "from pretrain.export.convert import convert; convert(checkpoint, out)",
    "zero_to_fp32, safetensors": (
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
        "convert(str(checkpoint), str(out), safe_serialization=True, tag='deepspeed')"
    ),
}


def bench_convert(checkpoint: Path, rounds: int) -> str:
    """Return a table of every way to convert a ZeRO checkpoint, the ways interleaved `rounds` times: medians.

    Raises:
        RuntimeError: If one of them fails.
    """
    checkpoint = resolve(checkpoint)
    measured: dict[str, list[tuple[float, int]]] = {way: [] for way in PROGRAMS}
    for _ in range(rounds):
        for way, program in PROGRAMS.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[way].append(_measure(program, checkpoint, Path(folder) / "out"))
    rows = [
        (way, median(seconds for seconds, _ in results), median(size for _, size in results) / 2**20)
        for way, results in measured.items()
    ]
    return render(["way", "seconds", "peak MiB"], rows)


def _measure(program: str, checkpoint: Path, out: Path) -> tuple[float, int]:
    """Return the seconds and peak resident bytes of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD + program, str(checkpoint), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{program!r} ended with {process.returncode} on {checkpoint}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024
