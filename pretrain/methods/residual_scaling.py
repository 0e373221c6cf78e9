"""Residual scaling: each residual branch is damped by a constant factor in forward instead of at initialization.

    y = x + f(Norm(x)) / √(2N)      N blocks

Each block adds two branches to the stream, so 2N of them have together the variance of one. GPT-2's initialization
(`residual_init`) divides the initial values. This divides the values in forward, so the optimizer gets matrices of the
same scale everywhere and the factor stays. It multiplies o and down, and their biases where the family has any, in
float32 before the cast, so the fold is exact to the bit.

Source: the comparison in Nishida et al. 2024 (arXiv 2410.05052), Tables 6 and 12: worse than the same factor at
initialization in all but SuperGLUE. The factor is no option.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from pretrain.methods.backbone import Backbone, backbone_rule, backbone_std
from pretrain.methods.base import FORM_OF_MATRICES, INITIAL_DEVIATIONS, Method
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import Multiple, applied, applied_to_bias, reparameterize
from pretrain.sharded import ShardedWeights

_TWICE = (
    "{} already makes the residual branches start smaller, for the sake of depth, and residual_scaling would do it again. "
    "Draw matrices with plain model.initializer_range, xavier_init or gg_init, or say residual_scaling.backbone"
)


class ResidualScaling(Method):
    """Residual scaling. Folds into the stock class by W ← W / √(2N) for o and down and their biases.

    Attributes:
        backbone: Draw matrices as `he` or `small` initialization without their own 1/√(2N), as the paper's two runs did
            (the run with `small` also has `embedding_scale` with `rule: inverse_std`). Null leaves the deviations to the
            run.
    """

    discouraged: ClassVar[Mapping[str, str]] = MappingProxyType(
        {name: _TWICE.format(name) for name in ("residual_init", "small_init", "he_init", "depth_scaled_init", "lir")}
    )
    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "attention_residuals": "attention_residuals takes a weighted mean of the outputs of sub-layers instead of their "
            "sum, so there is no sum that grows with depth for residual_scaling to hold down"
        }
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"direct_branches"})
    tensor_parallel: ClassVar[bool] = False
    fold_order: ClassVar[int] = 0

    name: Literal["residual_scaling"] = "residual_scaling"
    backbone: Backbone | None = None

    @property
    def decides(self) -> frozenset[str]:
        return frozenset({FORM_OF_MATRICES, *([INITIAL_DEVIATIONS] if self.backbone else [])})

    def transform(self, model: torch.nn.Module) -> None:
        for module in self._outputs():
            reparameterize(model, module, self._multiple)

    def init_std(self, weight: Weight) -> float | None:
        if self.backbone is None:
            return None
        std = backbone_std(self.backbone, weight, self.run, self.run.tied)
        return std / self._multiple.factor if weight.role in ("o", "down") else std

    def init_rule(self, weight: Weight) -> str | None:
        if self.backbone is None or not weight.fan_in:
            return None
        rule = backbone_rule(self.backbone, weight, self.run.tied)
        multiplied = " x sqrt(2N)" if weight.role in ("o", "down") else ""
        return f"residual_scaling: {rule}{multiplied}"

    def why_not_from_weights(self) -> str | None:
        if self.backbone is None:
            return None
        return (
            "residual_scaling.backbone decides initial values, which are those of the loaded model here. Leave it null"
        )

    def take_over(self, weights: ShardedWeights) -> None:
        """Divide what forward multiplies by 1/√(2N)."""
        names = [f"{module}.{kind}" for module in self._outputs() for kind in ("weight", "bias")]
        weights.rescale_({name: (1 / self._multiple.factor, 0.0) for name in names if name in weights.layout})

    def forward_factor(self, weight: Weight) -> float | str | None:
        return self._multiple.factor if weight.role in ("o", "down") else None

    def training_rule(self, weight: Weight) -> str | None:
        if weight.name.rpartition(".")[0] not in self._outputs():
            return None
        return f"residual_scaling: times 1 / sqrt(2N) = {self._multiple.factor:.4g}"

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        for module in self._outputs():
            change(tensors, f"{module}.weight", partial(applied, self._multiple))
            if f"{module}.bias" in tensors:
                change(tensors, f"{module}.bias", partial(applied_to_bias, self._multiple))
        return hf_config

    def fold_note(self) -> str | None:
        return (
            "the matrices that write to the residual stream, o and down, and their biases are multiplied by 1 / √(2N)"
        )

    @property
    def _multiple(self) -> Multiple:
        return Multiple(1 / sqrt(2 * self.run.layers), with_bias=True)

    def _outputs(self) -> list[str]:
        """Return the names of the modules that write to the residual stream."""
        return [module for module, weight in self.run.matrices.items() if weight.role in ("o", "down")]
