"""He initialization with the gains of WeSaR's table: every module starts with outputs of about unit scale.

    embeddings          1                           √(1 / fan_in) where the head shares the embedding's matrix
    q, k, v, gate, up   √(1 / fan_in)
    o                   √(1 / (2N · fan_in))
    down                √(2 / (2N · fan_in))        the 2 compensates for the activation before it
    head                √(1 / fan_in)

N is the number of blocks. 1/(2N) keeps the residual stream from growing with depth. Biases are 0, norms 1.

Source: He et al. 2015 (arXiv 1502.01852); Nishida et al. 2024, "Initialization of Large Language Models via
Reparameterization to Mitigate Loss Spikes" (arXiv 2410.05052), Table 1. The paper multiplies a narrower embedding by
1/σ. One of deviation 1 starts the stream at the same scale.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.layout import Weight


def he_std(weight: Weight, layers: int, tied: bool) -> float:
    """Return the standard deviation of a matrix.

    Args:
        weight: the matrix.
        layers: the number of blocks, N.
        tied: whether one matrix is embedding and head. With deviation 1 it would give logits of deviation √d.
    """
    if weight.role in ("embed", "position") and not tied:
        return 1.0
    gain = {"o": 1 / (2 * layers), "down": 2 / (2 * layers)}.get(weight.role, 1.0)
    return sqrt(gain / weight.fan_in)


def he_rule(weight: Weight, tied: bool) -> str:
    """Return the rule of `he_std` in words."""
    if weight.role in ("embed", "position") and not tied:
        return "1"
    return {"o": "sqrt(1 / (2N fan_in))", "down": "sqrt(2 / (2N fan_in))"}.get(weight.role, "sqrt(1 / fan_in)")


class HeInit(Method):
    """He initialization. Nothing happens during training and nothing is left to fold."""

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})

    name: Literal["he_init"] = "he_init"

    def init_std(self, weight: Weight) -> float | None:
        return he_std(weight, self.run.layers, self.run.tied)

    def init_rule(self, weight: Weight) -> str | None:
        return f"he_init: {he_rule(weight, self.run.tied)}" if weight.fan_in else None
