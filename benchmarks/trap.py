"""What the published TVR callback does under DeepSpeed, and ways around it: the numbers of docs/sharded_weights.md."""

from __future__ import annotations

from benchmarks.llama import STD
from benchmarks.ranks import run_ranks
from benchmarks.table import render


def bench_trap() -> str:
    """A table: the deviation of one matrix before, after and one step after each way to bring it down to half."""
    rows = measure_trap()
    header = ("ZeRO", "way", "std it sees", "working copy after", "master after", "working copy after the next step")
    cells = [
        (row["stage"], row["way"], *(f"{row[key]:.5f}" for key in ("seen", "working", "master", "next")))
        for row in rows
    ]
    explanation = (
        f"2 ranks, bf16. TVR from a standard deviation of {STD} to {STD / 2}; the next step has a learning rate of 0."
    )
    return f"{explanation}\n\n{render(header, cells)}"


def measure_trap() -> list[dict]:
    """One row per ZeRO stage and way; see trap_worker.measure."""
    return run_ranks("benchmarks.trap_worker", [1, 3], 2)
