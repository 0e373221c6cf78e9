"""Compare the memory that tools/plan.py predicts for a rank with what real ranks hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.ranks import run_ranks
from benchmarks.table import render

RANKS = 2
_BF16 = {"bf16": {"enabled": True}}
_LLAMA = {
    "family": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
# Without dropout of attention: on a CPU it keeps the scores, which no kernel of a GPU does.
_GPT2 = {
    "family": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 512,
    "attn_pdrop": 0.0,
}


def _case(stage: int, half: bool = False, model: dict[str, Any] = _LLAMA, **keys: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"deepspeed": {"zero_optimization": zero, **(_BF16 if half else {})}, "model": model, **keys}


CASES: dict[str, dict[str, Any]] = {
    "llama, ZeRO-0, fp32": _case(0),
    "llama, ZeRO-1, bf16": _case(1, half=True),
    "llama, ZeRO-2, fp32": _case(2),
    "llama, ZeRO-2, bf16": _case(2, half=True),
    "llama, ZeRO-3, fp32": _case(3),
    "llama, ZeRO-3, bf16": _case(3, half=True),
    "llama, ZeRO-2, bf16, full": _case(2, half=True, activation_checkpointing="full"),
    "llama, ZeRO-2, bf16, selective": _case(2, half=True, activation_checkpointing="selective"),
    "llama, ZeRO-3, bf16, sequence 2": _case(3, half=True, parallel={"sequence": 2}),
    "llama with seednorm, ZeRO-3, bf16": _case(3, half=True, methods=[{"name": "seednorm"}]),
    "llama with wesar, ZeRO-3, bf16": _case(3, half=True, methods=[{"name": "wesar"}]),
    "qwen3, ZeRO-3, bf16": _case(
        3, half=True, model={**_LLAMA, "family": "qwen3", "num_key_value_heads": 2, "head_dim": 64}
    ),
    "gpt2, ZeRO-3, bf16": _case(3, half=True, model=_GPT2),
    # The last one: DeepSpeed keeps a tensor-parallel layout for the life of a process.
    "llama, ZeRO-1, bf16, tensor 2": _case(1, half=True, parallel={"tensor": 2}),
}


def measure_plan(names: Iterable[str] = CASES) -> list[dict[str, Any]]:
    """Return the figures of runs of `CASES`: {"name", "states", "kept"}, the latter two as plan_worker.measure describes them."""
    return run_ranks("benchmarks.plan_worker", {name: CASES[name] for name in names}, RANKS)


def bench_plan() -> str:
    """Return a table of the predicted and the measured bytes of a rank, for models, ZeRO stages and kinds of recomputation."""
    rows = [(row["name"], *_figures(row["states"]), *_figures(row["kept"])) for row in measure_plan()]
    explanation = (
        f"Of one of {RANKS} ranks, in MB (1e6 bytes). States: weights, gradients, masters and moments before a step. Kept: what "
        "is kept of a forward pass for the backward pass."
    )
    header = ("run", "states predicted", "measured", "ratio", "kept predicted", "measured", "ratio")
    return f"{explanation}\n\n{render(header, rows)}"


def _figures(part: dict[str, float]) -> tuple[str, str, str]:
    predicted, measured = part["predicted"], part["measured"]
    return f"{predicted / 1e6:.2f}", f"{measured / 1e6:.2f}", f"{predicted / measured:.3f}"
