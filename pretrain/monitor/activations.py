"""Massive activations: the extremes of the residual stream after each block.

On the probe batch, for each layer (Sun et al. 2024, "Massive Activations in Large Language Models"): the largest |h|, the
median |h|, and the excess kurtosis E[(h − h̄)⁴]/σ⁴ − 3 over channels, averaged over tokens. In training, only the largest
|h|.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.model.hidden_terms import after_blocks
from pretrain.monitor.rows import LayerActivations
from pretrain.optional import optional


def _statistics(layer: int, hidden: torch.Tensor) -> LayerActivations:
    """Return the values of one layer. hidden: (batch, seq_len, hidden_size) of any float dtype."""
    values = hidden.float()
    centred = values - values.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square() - 3.0
    magnitude = values.abs()
    return {
        "layer": layer,
        "top": magnitude.max().item(),
        "median": magnitude.median().item(),
        "excess_kurtosis": kurtosis.mean().item(),
    }


@contextmanager
def record_activations(model: torch.nn.Module) -> Iterator[list[LayerActivations]]:
    """Append the values of each decoder block to the yielded list at each forward pass, while the context is open.

    A block whose statistics fail is left out: other ranks may be in the same pass, and must not be left waiting.
    """
    layers: list[LayerActivations] = []

    def note(layer: int, hidden: torch.Tensor) -> None:
        with optional("activations", f"the activations of layer {layer} could not be measured"):
            layers.append(_statistics(layer, hidden.detach()))

    handles = after_blocks(model, note)
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


class LargestActivations:
    """The largest |h| after each block over the forward passes in training mode, until it is taken."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        """Measure from now on. The values are kept on `device`."""
        self._model = model
        self._largest = torch.zeros(len(after_blocks(model, self._note)), device=device)

    def take(self) -> torch.Tensor:
        """Return this rank's values and start again from 0.

        Returns:
            (blocks,) float32 on the device. NaN for a block with a NaN in h.
        """
        taken, self._largest = self._largest, torch.zeros_like(self._largest)
        return taken

    @torch.no_grad()
    def _note(self, layer: int, hidden: torch.Tensor) -> None:
        if self._model.training:
            lowest, highest = torch.aminmax(hidden)  # one pass, and no |h| in memory
            place = self._largest[layer - 1]
            torch.maximum(place, torch.maximum(-lowest, highest).float(), out=place)
