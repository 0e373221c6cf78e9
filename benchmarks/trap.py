"""Measure the published TVR callback under DeepSpeed, and ways around its trap: the numbers of docs/sharded_weights.md."""

from __future__ import annotations

from benchmarks.llama import STD
from benchmarks.ranks import run_ranks
from benchmarks.table import render


def bench_trap() -> str:
    """Return a table: the deviation of one matrix before, after and one step after each way to halve it."""
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
    """Return a row for each ZeRO stage and way, as trap_worker.measure describes them."""
    return run_ranks("benchmarks.trap_worker", [1, 3], 2)
