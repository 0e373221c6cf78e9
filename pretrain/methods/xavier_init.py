"""Xavier (Glorot normal) initialization: neither activations nor gradients grow from one matrix to the next.

    every matrix    √(2 / (fan_in + fan_out))

Embeddings and head are included. With a vocabulary V both are near √(2 / V), however wide the model is. GPT-2's fused qkv
counts as the three matrices that it holds, so that it starts like LLaMA's separate ones. Biases are 0, norms 1.

Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", with the
gain 1 and normal values. The options are the differences of nanoGPT and its descendants, and so of the runs of "Output
Embedding Centering" (arXiv 2601.02031): their q, k and v are one matrix of 3d outputs, √(1 / (2d)).
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.layout import Weight

_QKV = ("q", "k", "v", "qkv")


class XavierInit(Method):
    """Xavier initialization. Nothing happens during training and nothing is left to fold.

    Attributes:
        fused_qkv: Draw q, k and v with the fans of the one matrix that holds all three.
        unit_embedding: The embedding's rows have about length 1: a deviation of 1/√d.
        attention_output_std: σ. o starts with σ/√(2N) instead, as in GPT-2.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})

    name: Literal["xavier_init"] = "xavier_init"
    fused_qkv: bool = False
    unit_embedding: bool = False
    attention_output_std: float | None = Field(None, gt=0)

    def init_std(self, weight: Weight) -> float | None:
        if self.unit_embedding and weight.role == "embed":
            return 1 / sqrt(weight.fan_in)
        if self.attention_output_std is not None and weight.role == "o":
            return self.attention_output_std / sqrt(2 * self.run.layers)
        fan_out = self._fused_outputs if self._is_fused(weight) else weight.single_fan_out
        return sqrt(2 / (weight.fan_in + fan_out))

    def init_rule(self, weight: Weight) -> str | None:
        if self.unit_embedding and weight.role == "embed":
            return "xavier_init: 1 / sqrt(d)"
        if self.attention_output_std is not None and weight.role == "o":
            return f"xavier_init: {self.attention_output_std:g} / sqrt(2N)"
        outputs = "outputs of q, k and v" if self._is_fused(weight) else "fan_out"
        return f"xavier_init: sqrt(2 / (fan_in + {outputs}))" if weight.fan_in else None

    def _is_fused(self, weight: Weight) -> bool:
        return self.fused_qkv and weight.role in _QKV

    @property
    def _fused_outputs(self) -> int:
        """The number of outputs of q, k and v together, the same in every block."""
        return sum(m.fan_out for m in self.run.matrices.values() if m.role in _QKV and m.layer == 1)
