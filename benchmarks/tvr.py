"""Measure one application of TVR beside a training step, by scheme, number of ranks and model size.

Three schemes do the same arithmetic on the same ZeRO-3 weights, interleaved in one run, and are checked to agree:

    sharded     Evenkeel's engine: each rank reads its pieces, one small collective for all matrices
    gathered    DeepSpeed's public hooks: each full weight on every rank, one after another
    released    the published callback's: two all-reduces per matrix, on the pieces (tvr_released.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import linear_regression

from benchmarks.llama import SEQ_LEN
from benchmarks.ranks import run_ranks
from benchmarks.table import render
from pretrain.errors import UserError

SIZES = ((128, 4), (256, 10), (384, 10), (512, 11))  # hidden size, layers: 2M, 10M, 21M, 39M parameters
SCHEMES = ("sharded", "gathered", "released")


def bench_tvr(world_sizes: Sequence[int], rounds: int, tokens: int, resident_below: int) -> str:
    """Return two tables: every quantity at every size, and the power of the parameters with which each of them grows.

    Args: as of `measure_tvr`.
    """
    rows = measure_tvr(world_sizes, rounds, tokens, resident_below)
    distance = max(row["distance"] for row in rows)
    explanation = (
        f"A training step has {tokens:,} tokens; ZeRO-3, fp32, weights of fewer than "
        f"{resident_below:,} elements resident; medians over {rounds} rounds, the slowest rank. "
        "all: every block matrix is rescaled; none: every one is measured and left alone. collectives, received (by a "
        "rank, from others) and peak (memory beyond what was allocated before): all.\n"
        f"After one application the schemes' weights differ by at most {distance:.0e} (relative Frobenius distance)."
    )
    return "\n\n".join((explanation, _costs(rows), "Fitted growth: parameters to the power of", _growth(rows)))


def measure_tvr(
    world_sizes: Sequence[int],
    rounds: int,
    tokens: int,
    resident_below: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> list[dict[str, float]]:
    """Return a row for each number of ranks and model size, as tvr_worker.measure describes them.

    Args:
        world_sizes: Numbers of ranks.
        rounds: How many training steps to take at each size.
        tokens: Tokens of a training step.
        resident_below: DeepSpeed's stage3_param_persistence_threshold, in elements.
        sizes: Hidden size and layers of each model.

    Raises:
        UserError: If the ranks cannot share the tokens.
    """
    for ranks in world_sizes:
        if tokens % (ranks * SEQ_LEN):
            raise UserError(f"--tokens must be a multiple of {SEQ_LEN} tokens times {ranks} ranks, not {tokens}.")
    asked = {"sizes": sizes, "tokens": tokens, "rounds": rounds, "resident_below": resident_below}
    return [row for ranks in world_sizes for row in run_ranks("benchmarks.tvr_worker", asked, ranks)]


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return a of the least-squares fit of log value = a log size + b; None where the values are not all positive."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return linear_regression([log(size) for size in sizes], [log(value) for value in values]).slope


def _costs(rows: list[dict[str, float]]) -> str:
    header = [
        *("ranks", "parameters", "step s", "scheme", "all ms", "all / step", "none ms", "none / step"),
        *("collectives", "received KiB", "peak KiB"),
    ]
    cells = [
        (
            row["ranks"],
            f"{row['parameters'] / 1e6:.1f}M",
            row["step"],
            scheme,
            1e3 * row[f"{scheme} all"],
            f"{row[f'{scheme} all'] / row['step']:.2%}",
            1e3 * row[f"{scheme} none"],
            f"{row[f'{scheme} none'] / row['step']:.2%}",
            int(row[f"{scheme} collectives"]),
            row[f"{scheme} received"] / 2**10,
            row[f"{scheme} peak"] / 2**10,
        )
        for row in rows
        for scheme in SCHEMES
    ]
    return render(header, cells)


def _growth(rows: list[dict[str, float]]) -> str:
    cells: list[tuple[object, ...]] = []
    for ranks in dict.fromkeys(row["ranks"] for row in rows):
        mine = [row for row in rows if row["ranks"] == ranks]

        def exponent(key: str, mine: list[dict[str, float]] = mine) -> float | str:
            fitted = growth_exponent([row["parameters"] for row in mine], [row[key] for row in mine])
            return "-" if fitted is None else f"{fitted:.2f}"

        cells.append((ranks, "training step", exponent("step"), "", "", "", ""))
        quantities = ("all", "none", "collectives", "received", "peak")
        cells += [(ranks, scheme, *(exponent(f"{scheme} {what}") for what in quantities)) for scheme in SCHEMES]
    return render(("ranks", "", "seconds, all", "seconds, none", "collectives", "received", "peak"), cells)
