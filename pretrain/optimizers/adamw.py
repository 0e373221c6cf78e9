"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as torch has it, fused on GPUs.

    m <- b1 m + (1 - b1) G        v <- b2 v + (1 - b2) G²
    W <- (1 - h d) W - h (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

DeepSpeed's CPU Adam needs a C++ compiler and is no faster here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pretrain.optimizers.base import Algorithm, Cut, OptimKeys


class AdamW(Algorithm):
    name = "adamw"
    summary = "adamw"
    moments: ClassVar = {"exp_avg": 4, "exp_avg_sq": 4}

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        return torch.optim.AdamW

    def build(self, groups: list[dict[str, Any]], optim: OptimKeys) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **adam_options(optim))

    def directions(
        self, tensor: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], cut: Cut
    ) -> list[torch.Tensor] | None:
        if not state.keys() >= {"exp_avg", "exp_avg_sq", "step"}:
            return None
        beta1, beta2 = group["betas"]
        step = state["step"]  # it stays on the device: reading it would wait
        unbiased1, root2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
        divisors = torch._foreach_sqrt(cut(state["exp_avg_sq"]))
        torch._foreach_add_(divisors, group["eps"] * root2)
        torch._foreach_mul_(divisors, unbiased1 / root2)
        return list(torch._foreach_div(cut(state["exp_avg"]), divisors))


def adam_options(optim: OptimKeys) -> dict[str, Any]:
    """Return the options of torch's AdamW that all groups share."""
    return {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": torch.cuda.is_available() or None}


OPTIMIZER = AdamW()
