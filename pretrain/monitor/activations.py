"""Massive activations: the extremes of the residual stream after each block.

On the probe batch, per layer (Sun et al. 2024, "Massive Activations in Large Language Models"): the largest |h|, the
median |h|, and the excess kurtosis E[(h − h̄)⁴]/σ⁴ − 3 over channels, averaged over tokens. In training itself, the
largest |h| alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from pretrain.optional import optional

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
    """While open, each forward pass appends one row per decoder block (`layer` counted from 1) to the yielded list.

    A block whose statistics fail is left out: other ranks may be in the same pass, and must not be left waiting.
    """
    rows: Rows = []

    def note(layer: int, hidden: torch.Tensor) -> None:
        with optional("activations", f"the activations of layer {layer} could not be measured"):
            rows.append({"layer": layer, **_statistics(hidden)})

    handles = _after_blocks(model, note)
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class LargestActivations:
    """The largest |h| after each block over the forward passes in training mode, from now on until it is taken."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model = model
        self._largest = torch.zeros(len(_after_blocks(model, self._note)), device=device)

    def take(self) -> torch.Tensor:
        """(blocks,) float32 on the device, of this rank; NaN where some h was. The next ones start from 0."""
        taken, self._largest = self._largest, torch.zeros_like(self._largest)
        return taken

    @torch.no_grad()
    def _note(self, layer: int, hidden: torch.Tensor) -> None:
        if self._model.training:
            lowest, highest = torch.aminmax(hidden)  # one pass, and no |h| in memory
            place = self._largest[layer - 1]
            torch.maximum(place, torch.maximum(-lowest, highest).float(), out=place)


def _after_blocks(model: torch.nn.Module, note: Callable[[int, torch.Tensor], None]) -> list:
    """Call `note` with the layer, from 1, and the residual stream after each block; returns the hooks' handles."""
    blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h

    def hook(layer: int):
        def record(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            note(layer, hidden.detach())

        return record

    return [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks, start=1)]
