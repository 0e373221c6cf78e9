"""Muon for the matrices of the blocks: DeepSpeed's own, with options that make it do what its authors published.

One step on a matrix W of r rows and c columns with gradient G, learning rate h, momentum b and weight decay d:

    M <- b M + (1 - b) G                       the average of gradients
    U  = NewtonSchulz((1 - b) G + b M)         Nesterov; five rounds bring the singular values near 1
    W <- (1 - h d) W - h s sqrt(max(1, r/c)) U

DeepSpeed's is the `spectral` scale, s = 1. Moonshot's, which Outlier-Safe Pre-Training uses, steps by
0.2 sqrt(max(r, c)) U, about the root mean square of AdamW's updates. This is s = 0.2 sqrt(c), both for tall and for wide
matrices.

Sources: https://kellerjordan.github.io/posts/muon/, Liu et al. 2025, "Muon is scalable for LLM training"
(arXiv 2502.16982), and DeepSpeed's runtime/zero/muon. docs/deepspeed.md describes what DeepSpeed does differently.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from pretrain.model.layout import Weight

if TYPE_CHECKING:
    from pretrain.config.schema import OptimSection

# Besides block matrices, the matrices that Muon steps: square ones that a method puts around the blocks.
_OTHER_ROLES = ("projection",)


def steps(weight: Weight) -> bool:
    """Return whether Muon steps this weight, in a run that uses it."""
    return weight.in_block_matrix or weight.role in _OTHER_ROLES


def group_options(weight: Weight, config: OptimSection, weight_decay: float) -> dict[str, Any]:
    """Return the options of the parameter group of a weight that Muon steps.

    Args:
        weight: the weight.
        config: the run's `optim` section.
        weight_decay: its weight decay, per unit of learning rate.

    Returns:
        DeepSpeed's options of a group, and `lr_scale`: the learning rate of a step is multiplied by it. The part of it
        that scales the update divides the weight decay, because DeepSpeed multiplies that by the group's learning rate
        too.
    """
    scale = 0.2 * sqrt(weight.shape[1]) if config.muon.scale == "adam_rms" else 1.0
    return {
        "lr_scale": scale * (config.muon.lr or config.lr) / config.lr,
        "weight_decay": weight_decay / scale,
        "momentum": config.muon.momentum,
        "ns_method": config.muon.ns_method,
    }


def optimizer(groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    """Return Muon over the groups with `use_muon`, and torch's AdamW with the options `adam` over the others."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # Newton-Schulz would be compiled, which takes a C++ compiler
    for group in groups:
        if not group["use_muon"]:
            group.update(adam)  # without them DeepSpeed would put its own betas and eps here, which take precedence
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # DeepSpeed reads it from the parameters as well as the groups
    return MuonWithAuxAdam(groups, torch.optim.AdamW, adam)
