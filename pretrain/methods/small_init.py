"""Small initialization: every matrix starts smaller than usual, the outputs of the residual branches smaller still.

    all matrices    √(2 / (5d))
    o, down         √(2 / (5d)) / √(2N)

d is the hidden size, N the number of blocks. 2/(5d) is Xavier's variance of a d x 4d matrix. Biases are 0, norms 1.

Source: Nguyen and Salazar 2019, "Transformers without Tears" (arXiv 1910.05895). Nishida et al. 2024 (arXiv 2410.05052)
have it in their baseline, with the embedding also scaled to deviation 1: `embedding_scale` with `rule: inverse_std`.
GPT-NeoX has it with another rule for o and down.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.layout import Weight


def small_std(weight: Weight, hidden_size: int, layers: int) -> float:
    """Return the standard deviation of a matrix in a model of `layers` blocks."""
    std = sqrt(2 / (5 * hidden_size))
    return std / sqrt(2 * layers) if weight.role in ("o", "down") else std


def small_rule(weight: Weight) -> str:
    """Return the rule of `small_std` in words."""
    return "sqrt(2 / (5d)) / sqrt(2N)" if weight.role in ("o", "down") else "sqrt(2 / (5d))"


class SmallInit(Method):
    """Small initialization. Nothing happens during training and nothing is left to fold."""

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})

    name: Literal["small_init"] = "small_init"

    def init_std(self, weight: Weight) -> float | None:
        return small_std(weight, self.run.hidden_size, self.run.layers)

    def init_rule(self, weight: Weight) -> str | None:
        return f"small_init: {small_rule(weight)}" if weight.fan_in else None
