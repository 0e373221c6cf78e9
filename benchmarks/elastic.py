"""Compare loading a checkpoint on another number of ranks with DeepSpeed's universal path, in time, memory and disk space.

The checkpoint is one that 8 ranks of ZeRO-3 would have written, of a LLaMA with hidden size 2048, with random values. Two
ranks load it: from the files as they are, or from what DeepSpeed's converter makes of them, with DeepSpeed's own loader. All
ways build the same DeepSpeed engine, and `engine alone` loads nothing.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import ceil, prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.elastic_worker import shapes_of
from benchmarks.table import render
from benchmarks.usage import Usage, measure
from pretrain.processes import own_package

WRITERS, READERS = 8, 2
STEP = 100
_WORKER = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={READERS}"]
_CONVERTER = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]


def bench_elastic(layers: int, rounds: int, folder: Path | None) -> str:
    """Return a table of the ways to load the checkpoint of a model of `layers` blocks, interleaved `rounds` times: medians.

    A way that fails, for want of memory perhaps, is named below the table.

    Args:
        layers: 16 make about 1B parameters.
        rounds: how often each way is measured.
        folder: where the files go, for a time. None for the system's temporary folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, universal = Path(place) / "source", Path(place) / "universal"
        _write_checkpoint(source / "deepspeed", layers)
        rows: dict[str, list[tuple[float, float, float]]] = {}
        failures: dict[str, str] = {}

        def note(name: str, run: Callable[[], tuple[float, Usage]], disk: Path | None = None) -> None:
            try:
                seconds, used = run()
            except RuntimeError as error:
                signals = re.findall(r"Signal \d+ \(SIGKILL\)", str(error))
                failures[name] = "was killed (SIGKILL), as where memory ends" if signals else str(error)
                return
            rows.setdefault(name, []).append((seconds, used.peak_bytes / 2**30, _gigabytes(disk) if disk else 0.0))

        for _ in range(rounds):
            note("engine alone", lambda: _load("nothing", source, layers))
            note("Evenkeel, from the files", lambda: _load("evenkeel", source, layers))
            note("DeepSpeed, conversion", lambda: _convert(source, universal), universal)
            note("DeepSpeed, load", lambda: _load("deepspeed", universal, layers))
            for path in sorted(universal.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        parameters = sum(map(prod, shapes_of(layers).values()))
        title = f"{parameters / 1e6:,.0f}M parameters, {_gigabytes(source):.1f} GB written by {WRITERS} ranks, read by {READERS}"
        table = [(name, *(median(values) for values in zip(*found, strict=True))) for name, found in rows.items()]
    failed = "".join(f"\n\n{name}: {why}" for name, why in failures.items())
    return f"{title}\n\n" + render(["way", "seconds", "peak GiB of all processes", "GB more on disk"], table) + failed


def _convert(source: Path, universal: Path) -> tuple[float, Usage]:
    """Let DeepSpeed make a universal checkpoint. Returns the seconds, and what it uses."""
    began, folders = time.perf_counter(), [str(source / "deepspeed"), str(universal / "all")]
    used = measure([*_CONVERTER, "--input_folder", folders[0], "--output_folder", folders[1]], own_package())
    return time.perf_counter() - began, used


def _load(way: str, source: Path, layers: int) -> tuple[float, Usage]:
    """Return the seconds until all ranks have loaded, and what all ranks use from their start to their end."""
    argument = json.dumps({"way": way, "source": str(source), "layers": layers})
    used = measure([*_WORKER, "-m", "benchmarks.elastic_worker", argument], {**own_package(), "OMP_NUM_THREADS": "1"})
    [found] = (json.loads(line) for line in used.output.splitlines() if line.startswith("{"))
    return found["seconds"], used


def _write_checkpoint(folder: Path, layers: int) -> None:
    """Write the files of WRITERS ranks of ZeRO-3 with AdamW, as DeepSpeed lays them out."""
    import deepspeed

    shapes = shapes_of(layers)
    length = sum(ceil(prod(shape) / WRITERS) for shape in shapes.values())
    common = {"dp_world_size": WRITERS, "mp_world_size": 1, "ds_version": deepspeed.__version__, "ds_config": {}}
    counters = {"global_steps": STEP, "global_samples": STEP, "skipped_steps": 0}
    model = {"module": {}, "optimizer": None, "lr_scheduler": None, "buffer_names": [], **common, **counters}
    model["param_shapes"] = [{name: torch.Size(shape) for name, shape in shapes.items()}]
    folder.mkdir(parents=True)
    for rank in range(WRITERS):
        draw = torch.Generator().manual_seed(rank)
        moments = {key: torch.rand(length, generator=draw) for key in ("exp_avg", "exp_avg_sq")}
        state = {"step": torch.tensor(float(STEP)), **moments}
        groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}]
        optimizer: dict[str, Any] = {
            "zero_stage": 3,
            "partition_count": WRITERS,
            "fp32_flat_groups": [torch.rand(length, generator=draw)],
            "optimizer_state_dict": {"state": {0: state}, "param_groups": groups},
        }
        files: Sequence[tuple[str, dict[str, Any]]] = (
            ("model", model),
            ("optim", {"optimizer_state_dict": optimizer, "ds_version": deepspeed.__version__, "ds_config": {}}),
        )
        for kind, content in files:
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
