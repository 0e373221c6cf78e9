"""Edits of exported weights that several methods' folds share. Weights stay unloaded until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pretrain.methods.base import LazyTensors

_FINAL_NORM = ("model.norm.weight", "model.norm.alpha", "transformer.ln_f.weight", "transformer.ln_f.bias")


def as_lazy(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Tensors that are in memory, as folds take them."""
    return {name: partial(_itself, tensor) for name, tensor in tensors.items()}


def change(tensors: LazyTensors, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the weight `name` what `function` makes of it."""
    load = tensors[name]
    tensors[name] = lambda: function(load())


def scale_final_norm(tensors: LazyTensors, factor: float | torch.Tensor) -> None:
    """Multiply what the final norm gives to the head by `factor`."""
    for name in _FINAL_NORM:
        if name in tensors:
            change(tensors, name, lambda gain: gain * factor)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
