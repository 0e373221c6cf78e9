"""mu-centering: keep the mean of the output embeddings at zero.

    U ← U − 1 μᵀ,    μ = mean over all rows of U    after every optimizer step

U is the head's matrix, (vocabulary, hidden size). A common shift of all logits of a token does not change the softmax. So
the loss does not depend on μ, and SGD would not move it. Adam does move it, and the logits drift together until they lose
their digits. Without tied embeddings the probabilities are the same right after centring. With them U also is the input
embedding, which loses its common vector: the function changes. A bias of the head is centred as well, or the logits would
drift in it.

Source: Stollenwerk et al. 2026, "Output Embedding Centering" (arXiv 2601.02031). No options.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pretrain.methods.base import Method
from pretrain.model.layout import Weight
from pretrain.sharded import ShardedWeights

_BIAS = "lm_head.bias"


class MuCentering(Method):
    """mu-centering. The weights stay plain, so nothing is left to fold."""

    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "mu_loss": "mu_centering keeps the mean at zero that mu_loss would pull there, so mu_loss would do nothing",
        }
    )
    discouraged: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"softcap": "a capped softmax changes when all logits shift, so centring would change the probabilities"}
    )

    name: Literal["mu_centering"] = "mu_centering"

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        weights.center_rows_([name for name in (self.run.head, _BIAS) if name in weights.layout])
        return {}

    def training_rule(self, weight: Weight) -> str | None:
        return "mu_centering: - its mean row, after each step" if weight.name in (self.run.head, _BIAS) else None
