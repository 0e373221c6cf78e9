"""Layer Index Rescaling (LIR): deeper blocks start smaller.

    W_l ~ N(0, σ² / (l · scale_factor)),  l = 1..N counted from 1

This holds for every matrix of decoder block l. Matrices outside the blocks (embeddings, head) are N(0, σ²), biases 0,
norms 1. The embedding's row of `model.pad_token_id`, if there is one, is 0, as with every initialization here. (The run's
`init` section may choose another distribution than the normal. The deviations are the same.)

Source: Owen et al. 2025, "Variance Control via Weight Rescaling in LLM Pre-training" (arXiv 2503.17500) and its
release. Unlike the release it covers GPT-2's Conv1D matrices, and a block that it does not find is an error.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.layout import Weight


class LIR(Method):
    """LIR at initialization. Nothing happens during training and nothing is left to fold.

    Attributes:
        initializer_range: σ. The release defaults to 0.02, the paper's best 1B run used 0.006.
        scale_factor: Divides the variance of every block once more.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})

    name: Literal["lir"] = "lir"
    initializer_range: float = Field(0.02, gt=0)
    scale_factor: float = Field(1.0, gt=0)

    def init_std(self, weight: Weight) -> float | None:
        if weight.in_block_matrix:
            return self.initializer_range / sqrt(weight.depth * self.scale_factor)
        return self.initializer_range

    def init_rule(self, weight: Weight) -> str | None:
        if not weight.in_block_matrix:
            return f"lir: {self.initializer_range:g}" if weight.fan_in else None
        depth = "l" if self.scale_factor == 1.0 else f"({self.scale_factor:g} l)"
        return f"lir: {self.initializer_range:g} / sqrt({depth})"
