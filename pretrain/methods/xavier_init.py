"""Xavier (Glorot normal) initialization: neither activations nor gradients grow from one matrix to the next.

    every matrix    √(2 / (fan_in + fan_out))

Embeddings and head included: of a vocabulary V both are near √(2 / V), however wide the model. GPT-2's fused qkv counts
as the three matrices that it holds, so that it starts like LLaMA's separate ones. Biases 0, norms 1.

Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", with the
gain 1 and normal values. It has no settings.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pretrain.layout import Weight
from pretrain.methods.base import INITIAL_DEVIATIONS, Method


class XavierInit(Method):
    """Xavier initialization; nothing happens during training and nothing is left to fold."""

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})

    name: Literal["xavier_init"] = "xavier_init"

    def init_std(self, weight: Weight) -> float | None:
        return sqrt(2 / (weight.fan_in + weight.single_fan_out))

    def init_rule(self, weight: Weight) -> str | None:
        return "xavier_init: sqrt(2 / (fan_in + fan_out))" if weight.fan_in else None
