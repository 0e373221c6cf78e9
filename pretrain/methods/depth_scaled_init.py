"""Depth-scaled initialization: the outputs of block l to the residual stream start smaller, the deeper the block is.

    o, down          σ / √(2l)      l = 1..N counted from 1
    other matrices   σ

Embeddings and head are included. `residual_init` divides by the same √(2N) everywhere. This divides by the root of the
number of outputs that the stream holds after block l. LIR divides every matrix of block l by √l. Biases are 0, norms 1.

Source: after Zhang et al. 2019 (arXiv 1908.11365). √(2l) and the default 0.02 are those of torchtitan's Llama and of
OLMo-core's `llama_depth`. Those two also divide the `up` matrices, draw embeddings with deviation 1 and the head with
1/√d. OLMo-core cuts its normals at 3 deviations, which `init: {distribution: truncated_normal}` does here.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.families import Need
from pretrain.model.layout import Weight


class DepthScaledInit(Method):
    """Depth-scaled initialization. Nothing happens during training and nothing is left to fold.

    Attributes:
        std: σ.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})
    needs: ClassVar[frozenset[Need]] = frozenset({"direct_branches"})

    name: Literal["depth_scaled_init"] = "depth_scaled_init"
    std: float = Field(0.02, gt=0)

    def init_std(self, weight: Weight) -> float | None:
        return self.std / sqrt(2 * weight.depth) if weight.role in ("o", "down") else self.std

    def init_rule(self, weight: Weight) -> str | None:
        divided = " / sqrt(2 l)" if weight.role in ("o", "down") else ""
        return f"depth_scaled_init: {self.std:g}{divided}" if weight.fan_in else None
