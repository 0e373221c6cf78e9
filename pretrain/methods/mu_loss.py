"""mu-loss: pull the mean of the output embeddings towards zero.

    L += coefficient · μᵀμ,    μ = mean over all rows of U

U is the head's matrix, (vocabulary, hidden size), as forward multiplies by it. The gradient, 2 · coefficient · μ / V, is
the same for all V rows. It moves the mean alone, which the cross-entropy does not depend on. This is the soft form of
mu-centering.

Source: Stollenwerk et al. 2026, "Output Embedding Centering" (arXiv 2601.02031). The default is 1e-4. The paper finds
1e-4 to 1e2 about equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from pretrain.methods.base import Method
from pretrain.model.layout import Weight
from pretrain.model.loss import HeadTerm, LossTerm


class MuLoss(Method):
    """mu-loss. The weights stay plain, so nothing is left to fold.

    Attributes:
        coefficient: The factor of the term in the loss.
    """

    name: Literal["mu_loss"] = "mu_loss"
    coefficient: float = Field(1e-4, gt=0)

    def loss_terms(self) -> Mapping[str, LossTerm]:
        return {self.name: HeadTerm(self._of_weight)}

    def training_rule(self, weight: Weight) -> str | None:
        return f"mu_loss: + {self.coefficient:g} x |mean row|^2" if weight.name == self.run.head else None

    def _of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the term, a scalar, for the head's matrix, (vocabulary, hidden size)."""
        return self.coefficient * weight.mean(0).square().sum()
