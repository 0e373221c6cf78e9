"""LayerNorm Scaling (LNS): the outputs of the norms of block l are divided by √l, so that deep blocks keep an effect.

    h = Norm(x) / √l      both norms of block l, counted from 1

The final norm and those of q and k stay as they are. In a pre-norm model the variance of the residual stream can grow
exponentially with depth, so that a deep block changes its input less and less ("the curse of depth"). With the division
it grows linearly at most. Here the gain is divided, γ ← γ / √l, in float32 before the cast. This is the same formula and
makes the fold exact to the bit.

Source: Sun et al. 2025, "The Curse of Depth in Large Language Models" (arXiv 2502.05795). It has no options.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from pretrain.methods.base import Method
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.families import FAMILIES, Need
from pretrain.model.layout import Weight, role_and_layer
from pretrain.model.modeling_evenkeel import SeeDNorm
from pretrain.model.norms import BLOCK_NORMS, ScaledLayerNorm, ScaledSeeDNorm, change_norm, scaled
from pretrain.sharded import ShardedWeights

_TWICE = (
    "{} already makes the residual branches start smaller, for the sake of depth, and LayerNorm Scaling does best "
    "without that (perplexity 20.35 instead of 20.79 at 250M, arXiv 2502.05795). Draw matrices with plain "
    "model.initializer_range, or with xavier_init"
)


class LayerNormScaling(Method):
    """LayerNorm Scaling. Folds into the stock class by γ ← γ / √l, in GPT-2 the norm's bias too."""

    discouraged: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            name: _TWICE.format(name)
            for name in ("residual_init", "small_init", "he_init", "depth_scaled_init", "residual_scaling", "wesar")
        }
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"pre_norm"})

    name: Literal["layernorm_scaling"] = "layernorm_scaling"

    def transform(self, model: torch.nn.Module) -> None:
        for name, norm in list(model.named_modules()):
            if not name.endswith(BLOCK_NORMS):
                continue
            factor = _factor(f"{name}.weight")
            if isinstance(norm, torch.nn.LayerNorm):
                model.set_submodule(name, ScaledLayerNorm(self.run.hidden_size, norm.eps, factor))
            elif isinstance(norm, SeeDNorm):
                model.set_submodule(name, ScaledSeeDNorm(self.run.hidden_size, norm.eps, factor))
            else:
                change_norm(model, name, factor=factor)

    def take_over(self, weights: ShardedWeights) -> None:
        """Multiply what forward divides by √l."""
        weights.rescale_({name: (1 / _factor(name), 0.0) for name in weights.layout if _is_scaled(name)})

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        for name in tensors:
            if _is_scaled(name):
                change(tensors, name, partial(scaled, factor=_factor(name)))
        return hf_config

    def fold_note(self) -> str | None:
        divided = "gains" if "rms_norm" in FAMILIES[self.run.family].has else "gains and biases"
        return f"the {divided} of block l's norms are divided by √l"

    def training_rule(self, weight: Weight) -> str | None:
        return "layernorm_scaling: / sqrt(l)" if _is_scaled(weight.name) else None


def _is_scaled(name: str) -> bool:
    """Return whether a weight is the gain or the bias of a block's norm, or the α of its SeeDNorm."""
    module, _, kind = name.rpartition(".")
    return module.endswith(BLOCK_NORMS) and kind != "beta"


def _factor(name: str) -> float:
    """Return 1 / √l for a weight of block l."""
    _, layer = role_and_layer(name)
    assert layer is not None  # a norm of a block
    return 1 / sqrt(layer)
