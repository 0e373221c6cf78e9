"""Edits of exported weights and configurations that several methods share. Weights stay unloaded until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from pretrain.model.families import FAMILIES

# Exported weights by name, each a function that loads it (float32), so that only one tensor at a time is in memory.
LazyTensors = MutableMapping[str, Callable[[], torch.Tensor]]

_Config = TypeVar("_Config", bound=PreTrainedConfig)
_FINAL_NORM = tuple(
    f"{norm}.{kind}"
    for norm in sorted({family.final_norm for family in FAMILIES.values()})
    for kind in ("weight", "alpha", "bias")
)


def as_lazy(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Return tensors that are in memory in the form that folds take."""
    return {name: partial(_itself, tensor) for name, tensor in tensors.items()}


def change(tensors: LazyTensors, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a weight by a function of it, which runs when the weight is loaded."""
    load = tensors[name]
    tensors[name] = lambda: function(load())


def scale_final_norm(tensors: LazyTensors, factor: float | torch.Tensor) -> None:
    """Multiply the output of the final norm by `factor`: a number, or a tensor of one element."""
    for name in _FINAL_NORM:
        if name in tensors:
            change(tensors, name, lambda gain: gain * factor)


def as_config(
    cls: type[_Config], hf_config: PreTrainedConfig, *, declared_only: bool = False, **changes: Any
) -> _Config:
    """Convert a configuration to another class.

    Args:
        cls: the class.
        hf_config: the configuration.
        declared_only: drop fields that `cls` does not declare. Otherwise they are kept (Granite reads a `head_dim`).
        changes: fields to set.

    Returns:
        A new configuration.
    """
    kept = {key: value for key, value in hf_config.to_dict().items() if key not in ("model_type", "architectures")}
    if declared_only:
        kept = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
    return cls(**kept | changes)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
