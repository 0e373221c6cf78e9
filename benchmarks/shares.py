"""Measure the parts of Evenkeel's step that a plain DeepSpeed loop does not have, as shares of the step."""

from __future__ import annotations

from benchmarks.ranks import run_ranks
from benchmarks.table import render

TOKENS = 4096
SIZES = {"4.7M": (256, 4), "39M": (512, 11)}  # hidden size and blocks, by parameters
DEEPSPEED = {"zero_optimization": {"stage": 3}}


def bench_shares(ranks: int, rounds: int) -> str:
    """Return a table of median shares over `rounds` steps of each model, with TVR at every step."""
    rows = []
    for parameters, (hidden_size, layers) in SIZES.items():
        asked = {"hidden_size": hidden_size, "layers": layers, "tokens": TOKENS, "rounds": rounds}
        (shares,) = run_ranks("benchmarks.shares_worker", {**asked, "deepspeed": DEEPSPEED}, ranks)
        rows.append((parameters, *(f"{100 * shares[part]:.2f}%" for part in ("recorder", "gate", "TVR", "optimizer"))))
    return render(("parameters", "recorder of autopsies", "gate", "TVR, every step", "optimizer"), rows)
