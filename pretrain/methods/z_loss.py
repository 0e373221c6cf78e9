"""z-loss: keep the logarithm of the softmax's denominator near zero.

    L += coefficient · mean over tokens of (log Σ_v exp(logit_v))²

Only tokens that count in the cross-entropy count here (the published code of arXiv 2601.02031 also counts ignored ones).
It holds down the mean of the logits and their spread. mu-centering and mu-loss hold down the mean alone.

Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, section 5) and Wortsman et al. 2023 (arXiv 2309.14322).
The default is 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from pretrain.methods.base import Method
from pretrain.model.layout import Weight
from pretrain.model.loss import LossTerm, TokenTerm


class ZLoss(Method):
    """z-loss. The weights stay plain, so nothing is left to fold.

    Attributes:
        coefficient: The factor of the term in the loss.
    """

    name: Literal["z_loss"] = "z_loss"
    coefficient: float = Field(1e-4, gt=0)

    def loss_terms(self) -> Mapping[str, LossTerm]:
        return {self.name: TokenTerm(self._of_logits)}

    def training_rule(self, weight: Weight) -> str | None:
        return f"z_loss: + {self.coefficient:g} x logsumexp(logits)^2" if weight.name == self.run.head else None

    def _of_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the term of each token, (tokens,), for logits (tokens, vocabulary)."""
        return self.coefficient * logits.logsumexp(-1).square()
