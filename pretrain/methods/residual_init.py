"""GPT-2's residual initialization: matrices that write to the residual stream start smaller, the more blocks there are.

    o, down          σ / √(2N)
    other matrices   σ

Embeddings and head are included. N is the number of blocks. Each block adds two outputs to the stream, so 2N of them have
together the variance of one matrix of deviation σ. Biases are 0, norms 1.

Source: Radford et al. 2019 (GPT-2), section 2.3. Owen et al. 2025 (arXiv 2503.17500) compare it with LIR and call it
special residual initialization. The default is 0.02.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.methods.base import INITIAL_DEVIATIONS, Method
from pretrain.model.families import Need
from pretrain.model.layout import Weight


class ResidualInit(Method):
    """Residual initialization. Nothing happens during training and nothing is left to fold.

    Attributes:
        std: σ.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS})
    needs: ClassVar[frozenset[Need]] = frozenset({"direct_branches"})

    name: Literal["residual_init"] = "residual_init"
    std: float = Field(0.02, gt=0)

    def init_std(self, weight: Weight) -> float | None:
        return self.std / sqrt(2 * self.run.layers) if weight.role in ("o", "down") else self.std

    def init_rule(self, weight: Weight) -> str | None:
        divided = " / sqrt(2N)" if weight.role in ("o", "down") else ""
        return f"residual_init: {self.std:g}{divided}" if weight.fan_in else None
