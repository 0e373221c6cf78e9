"""Lion: the sign of an interpolated momentum.

    U = sign(b1 m + (1 - b1) G)
    W <- (1 - h d) W - h U
    m <- b2 m + (1 - b2) G

It keeps one moment, so it takes 4 bytes a parameter less than AdamW. Every element moves by h, so the paper takes a
learning rate 3 to 10 times smaller than AdamW's, and a weight decay as many times larger.

Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), program 1. Its betas are 0.9
and 0.99, for language models 0.95 and 0.98.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pretrain.optimizers.base import Algorithm, Cut, OptimKeys


class LionOptimizer(torch.optim.Optimizer):
    """Lion for any tensors, as flat ones of DeepSpeed. The moments are called as Adam's first."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure: gradients come from DeepSpeed
        """Take a step with the gradients that are in place."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
                moment, gradient = state["exp_avg"], weight.grad.float()
                weight.mul_(1 - rate * group["weight_decay"])
                weight.sub_(torch.lerp(gradient, moment, beta1).sign_().to(weight.dtype), alpha=rate)
                moment.lerp_(gradient, 1 - beta2)


class Lion(Algorithm):
    name = "lion"
    summary = "lion"
    unused = ("eps",)
    moments: ClassVar = {"exp_avg": 4}

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        return LionOptimizer

    def build(self, groups: list[dict[str, Any]], optim: OptimKeys) -> torch.optim.Optimizer:
        return LionOptimizer(groups, {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay})

    def directions(
        self, tensor: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], cut: Cut
    ) -> list[torch.Tensor] | None:
        """Compute U from the moment after the step and the gradient.

        The moment before it is (m - (1 - b2) G) / b2, so an element whose sign rounding decides may have the other one.
        """
        beta1, beta2 = group["betas"]
        if tensor.grad is None or "exp_avg" not in state or beta2 == 0:  # with b2 = 0 the moment before is lost
            return None
        gradients = [part.float() for part in cut(tensor.grad)]
        mixed = torch._foreach_mul(cut(state["exp_avg"]), beta1 / beta2)
        torch._foreach_add_(mixed, gradients, alpha=(1 - beta1) - beta1 * (1 - beta2) / beta2)
        torch._foreach_sign_(mixed)
        return list(mixed)


OPTIMIZER = Lion()
