"""Edits of exported weights and configurations that several methods share. Weights stay unloaded until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

# Exported weights by name, each a function that loads it (float32), so that only the tensor at hand is in memory.
LazyTensors = MutableMapping[str, Callable[[], torch.Tensor]]

_Config = TypeVar("_Config", bound=PreTrainedConfig)
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


def as_config(
    cls: type[_Config], hf_config: PreTrainedConfig, *, declared_only: bool = False, **changes: Any
) -> _Config:
    """What `hf_config` says, as a configuration of the class `cls`, with `changes`.

    Fields that `cls` does not declare are kept all the same (Granite reads a `head_dim`), unless `declared_only`.
    """
    kept = {key: value for key, value in hf_config.to_dict().items() if key not in ("model_type", "architectures")}
    if declared_only:
        kept = {field.name: kept[field.name] for field in fields(cls) if field.name in kept}
    return cls(**kept | changes)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
