"""Embedding gradient shrink: the embedding learns from a fraction of its gradient.

    x₀ = α E[t] + (1 - α) sg(E[t])    with sg the stop of gradients, so x₀ = E[t] and ∂L/∂E is multiplied by α

GLM-130B traced its loss spikes to the gradient of the embedding, which was orders of magnitude above that of other layers
early in training. The gradient that reaches a tied head through the logits is not shrunk. x₀ is E[t] to the bit here,
where the sum would round.

Adam divides a gradient by its own size, so it takes the same step for any α. What α changes under Adam is the global
norm, and with it the clipping of all weights, and a tied matrix, where it weighs one of two gradients.

Source: Zeng et al. 2022, "GLM-130B" (arXiv 2210.02414), on training stability, α 0.1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from pretrain.methods.base import EMBEDDING, Method
from pretrain.model.layout import Weight, embedding_of
from pretrain.sharded import ShardedWeights


class ShrunkGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, alpha: float) -> torch.Tensor:
        ctx.alpha = alpha
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.alpha, None


class ShrunkEmbedding(nn.Embedding):
    """`nn.Embedding` whose gradient is multiplied by `alpha`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, alpha: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.alpha = alpha

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ShrunkGradient.apply(super().forward(ids), self.alpha)


class EmbeddingGradientShrink(Method):
    """Embedding gradient shrink. The weights stay plain, so nothing is left to fold.

    Attributes:
        alpha: The factor of the gradient.
    """

    decides: ClassVar[frozenset[str]] = frozenset({EMBEDDING})

    name: Literal["embedding_gradient_shrink"] = "embedding_gradient_shrink"
    alpha: float = Field(0.1, gt=0, lt=1)

    def transform(self, model: nn.Module) -> None:
        old = embedding_of(model, self.run.embedding)
        new = ShrunkEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, self.alpha)
        model.set_submodule(self.run.embedding, new)

    def take_over(self, weights: ShardedWeights) -> None:
        """Do nothing: forward looks up the loaded rows."""

    def training_rule(self, weight: Weight) -> str | None:
        where = " as input" if self.run.tied else ""
        return f"embedding_gradient_shrink: gradient{where} times {self.alpha:g}" if weight.role == "embed" else None
