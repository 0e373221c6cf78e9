"""Measure the cost of each method as a share of a training step of the same model without it."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.ranks import run_ranks
from benchmarks.table import render
from pretrain.methods import REGISTRY

HIDDEN_SIZE, LAYERS = 256, 10  # 9.9M parameters


def bench_methods(names: list[str], ranks: int, rounds: int, tokens: int) -> str:
    """Return a table of the methods called `names`, or of all methods and Muon if it is empty, most expensive first.

    Each round takes one step without and one with each method, one right after the other. The cost is the median of the
    ratios, less one.

    Args:
        names: Names of the registry.
        ranks: How many ranks to start.
        rounds: How many pairs of steps to take for each method.
        tokens: Tokens of a training step.
    """
    measured = measure_methods(names, ranks, rounds, tokens)
    rows = sorted(
        (
            (
                name,
                f"{100 * (median(ratios) - 1):+.1f}%",
                f"{100 * (min(ratios) - 1):+.1f} .. {100 * (max(ratios) - 1):+.1f}%",
            )
            for name, ratios in measured.items()
        ),
        key=lambda row: -float(row[1].rstrip("%")),
    )
    explanation = (
        f"A step of {tokens:,} tokens in micro-batches of at most 8 x 256 a rank, ZeRO-3, fp32, {ranks} rank(s), "
        f"{rounds} rounds. The method's work after the step is included, done at every step."
    )
    return f"{explanation}\n\n{render(('method', 'median', 'range'), rows)}"


def measure_methods(names: list[str], ranks: int, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Return the ratio of each round, by method, as methods_worker.measure describes them."""
    rivals: dict[str, dict[str, Any]] = {name: {"methods": [_options(name)]} for name in names or sorted(REGISTRY)}
    if not names:
        rivals["optim.name: muon"] = {"optim": {"name": "muon", "grad_clip": None}}
    asked = {"rivals": rivals, "hidden_size": HIDDEN_SIZE, "layers": LAYERS, "rounds": rounds, "tokens": tokens}
    return {row["name"]: row["ratios"] for row in run_ranks("benchmarks.methods_worker", asked, ranks)}


def _options(name: str) -> dict[str, Any]:
    return {"name": name, "interval_steps": 1} if name == "tvr" else {"name": name}
