"""Activation checkpointing: what a block keeps for its backward pass, and what that computes again.

off         everything is kept
full        a block keeps its input
selective   a block keeps its input and the results of matrix products and of attention, which take long to compute.
            The rest, the norms, rotations and activation functions, is computed again
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recomputation = Literal["full", "selective"]

_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_options(kind: Recomputation) -> dict[str, Any]:
    """Return the options of `torch.utils.checkpoint` for a kind of recomputation."""
    if kind == "full":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _policy)}


def _policy(context: object, operation: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
