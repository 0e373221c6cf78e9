"""Muon for the matrices of the blocks: DeepSpeed's own, with options that make it do what its authors published.

One step on a matrix W of r rows and c columns with gradient G, learning rate h, momentum b and weight decay d:

    M <- b M + (1 - b) G                       the average of gradients
    U  = NewtonSchulz((1 - b) G + b M)         Nesterov; five rounds bring the singular values near 1
    W <- (1 - h d) W - h s sqrt(max(1, r/c)) U

DeepSpeed's is the `spectral` scale, s = 1. Moonshot's, which Outlier-Safe Pre-Training uses, steps by
0.2 sqrt(max(r, c)) U, about the root mean square of AdamW's updates. This is s = 0.2 sqrt(c), both for tall and for wide
matrices. AdamW steps all other weights.

Sources: https://kellerjordan.github.io/posts/muon/, Liu et al. 2025, "Muon is scalable for LLM training"
(arXiv 2502.16982), and DeepSpeed's runtime/zero/muon. docs/deepspeed.md describes what DeepSpeed does differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from pretrain.model.layout import Weight
from pretrain.optimizers.adamw import OPTIMIZER as ADAMW
from pretrain.optimizers.adamw import adam_options
from pretrain.optimizers.base import Algorithm, Cut, Layout, OptimKeys
from pretrain.values import Positive, Share, Values

# Besides block matrices, the matrices that Muon steps: square ones that a method puts around the blocks.
_OTHER_ROLES = ("projection",)


class MuonOptions(Values):
    """Muon's options. AdamW, which steps the rest, takes those of `optim`.

    Attributes:
        lr: Peak learning rate. Null takes that of `optim`.
        momentum: Decay of the average of gradients.
        weight_decay: Null takes that of `optim`.
        scale: `adam_rms` makes an update about as large as AdamW's, so one learning rate fits both. `spectral` gives it
            singular values near 1, times sqrt(rows / columns) in tall matrices.
        ns_method: The Newton-Schulz iteration that orthogonalizes.
    """

    lr: Positive | None = Field(None, le=100)
    momentum: Share = 0.95
    weight_decay: float | None = Field(None, ge=0)
    scale: Literal["adam_rms", "spectral"] = "adam_rms"
    ns_method: Literal["gram", "standard"] = "gram"


class Muon(Algorithm):
    name = "muon"
    summary = "muon on block matrices, adamw on the rest"
    options = MuonOptions
    moments: ClassVar = {"momentum_buffer": 4}
    zero_keys: ClassVar = {"reduce_scatter": False}
    replaces_gradients = True
    compiles = True

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        return MuonWithAuxAdam

    def build(self, groups: list[dict[str, Any]], optim: OptimKeys) -> torch.optim.Optimizer:
        if not torch.cuda.is_available():
            torch.compiler.set_stance("force_eager")  # Newton-Schulz would be compiled, which takes a C++ compiler
        adam = adam_options(optim)
        for group in groups:
            if not group["use_muon"]:
                group.update(adam)  # without them DeepSpeed would put its own betas and eps here, which take precedence
            for parameter in group["params"]:
                parameter.use_muon = group["use_muon"]  # DeepSpeed reads it from the parameters as well as the groups
        make: Any = self.optimizer_class()
        return make(groups, torch.optim.AdamW, adam)

    def of_weight(self, weight: Weight) -> Algorithm:
        return self if weight.in_block_matrix or weight.role in _OTHER_ROLES else ADAMW

    def of_group(self, group: Mapping[str, Any]) -> Algorithm:
        return self if group["use_muon"] else ADAMW

    def peak_lr(self, optim: OptimKeys) -> float:
        return optim.own.lr or optim.lr

    def decay_of_matrices(self, optim: OptimKeys) -> float:
        own = optim.own.weight_decay
        return optim.weight_decay if own is None else own

    def group_options(self, weight: Weight, optim: OptimKeys, weight_decay: float) -> dict[str, Any]:
        """Return DeepSpeed's options of a group, and `lr_scale`.

        The part of it that scales the update divides the weight decay, because DeepSpeed multiplies that by the group's
        learning rate too.
        """
        if self.of_weight(weight) is not self:
            return {"use_muon": False, "weight_decay": weight_decay}
        scale = 0.2 * sqrt(weight.shape[1]) if optim.own.scale == "adam_rms" else 1.0
        return {
            "use_muon": True,
            "lr_scale": scale * self.peak_lr(optim) / optim.lr,
            "weight_decay": weight_decay / scale,
            "momentum": optim.own.momentum,
            "ns_method": optim.own.ns_method,
        }

    def decays(self, optim: OptimKeys) -> Iterator[tuple[str, float, float]]:
        yield from super().decays(optim)
        yield "muon.weight_decay", self.peak_lr(optim), self.decay_of_matrices(optim)

    def faults(self, optim: OptimKeys) -> Iterator[str]:
        if optim.grad_clip is not None:
            yield (
                "with 'name: muon' grad_clip must be null: DeepSpeed clips after Muon has made its updates, by their "
                "norm, which is the larger the more matrices the model has, so every step would be far too short"
            )
        if optim.zclip is not None:
            yield "with 'name: muon' zclip must be null: an update of Muon's does not grow with the gradient"

    def refusals(self, layout: Layout) -> Iterator[str]:
        if layout.tensor_ranks > 1:
            yield (
                f"optim.name muon with parallel.tensor {layout.tensor_ranks} is not supported: each rank would "
                "orthogonalize its own slice of a matrix instead of the matrix"
            )
        if layout.precision == "fp16":
            yield (
                "optim.name muon with fp16 is not supported: DeepSpeed keeps the momentum at the loss scale, so it is wrong "
                "when the scale changes. Use bf16 with ZeRO stage 1 or 3, or fp32"
            )
        if layout.precision == "bf16" and (layout.stage in (0, 2) or layout.accumulation != "fp32"):
            rounded_at = layout.stage in (0, 2)
            where = f"at ZeRO stage {layout.stage}" if rounded_at else 'with data_types.grad_accum_dtype "bf16"'
            yield (
                f"optim.name muon needs gradients and momentum in fp32, which DeepSpeed rounds to bf16 {where}: "
                "orthogonalizing makes that a large error. Use ZeRO stage 1 or 3 and accumulate in fp32"
            )
        if layout.zero.get("reduce_scatter"):
            yield (
                "optim.name muon needs zero_optimization.reduce_scatter false: with it DeepSpeed refuses stage 3, and loses "
                "gradients of what AdamW steps in half precision below. Leave the key out"
            )

    def directions(
        self, tensor: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], cut: Cut
    ) -> list[torch.Tensor] | None:
        """Return the gradients: DeepSpeed has put updates in their place, except at stage 0, where tensors are matrices."""
        if tensor.grad is None or tensor.dim() > 1:
            return None
        return [part.float().clone() for part in cut(tensor.grad)]


OPTIMIZER = Muon()
