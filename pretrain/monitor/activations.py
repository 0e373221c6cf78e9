"""Massive activations: the extremes of the residual stream after each block, on the probe batch.

Per layer (Sun et al. 2024, "Massive Activations in Large Language Models"): the largest |h|, the median |h|, and the
excess kurtosis E[(h − h̄)⁴]/σ⁴ − 3 over channels, averaged over tokens.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

Rows = list[dict[str, float]]


def _statistics(hidden: torch.Tensor) -> dict[str, float]:
    """hidden: (batch, seq_len, hidden_size) of any float dtype."""
    values = hidden.float()
    centred = values - values.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square() - 3.0
    magnitude = values.abs()
    return {
        "top": magnitude.max().item(),
        "median": magnitude.median().item(),
        "excess_kurtosis": kurtosis.mean().item(),
    }


@contextmanager
def record_activations(model: torch.nn.Module):
    """While open, each forward pass appends one row per decoder block (`layer` counted from 1) to the yielded list."""
    rows: Rows = []
    blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h

    def hook(layer: int):
        def record(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            rows.append({"layer": layer, **_statistics(hidden.detach())})

        return record

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks, start=1)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
