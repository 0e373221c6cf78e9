"""Generalized Gaussian initialization: trained weights have heavier tails than a normal, and so may the initial ones.

    W ~ GG(ν, α),   density ∝ exp(-(|x| / α)^ν),   α = √(gain / fan · Γ(1/ν) / Γ(3/ν))

This holds for every matrix, embeddings and head included. The variance is gain / fan whatever ν is. ν = 2 is the normal,
1 is Laplace's. The gain is 2 for ReLU-like activations (He), 1 for none. The fan is the number of inputs or outputs of
the matrix. GPT-2's fused qkv counts as the three matrices that it holds. Biases are 0, norms 1.

Source: the generalized Gaussian prior of arXiv 2506.00486 in its released gg_init.py, whose defaults these are: ν = 2,
gain 2 and the rows of the tensor for the fan. The rows of an nn.Linear are its outputs. Those of an embedding are the
vocabulary, so V = 65,536 gives it a deviation of 0.0055. `fan: in` counts the hidden size there. (Rows of GPT-2's Conv1D
are inputs. Here `out` means outputs for it as well.)
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.methods.base import INITIAL_DEVIATIONS, INITIAL_DISTRIBUTION, Method
from pretrain.model.layout import Weight
from pretrain.sharded.draws import Draw, GeneralizedGaussian


class GGInit(Method):
    """Generalized Gaussian initialization. Nothing happens during training and nothing is left to fold.

    Attributes:
        shape: ν.
        gain: The variance is gain / fan: 2 for activations like ReLU, 1 for none.
        fan: `out` as in the release, `in` as in He's initialization.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS, INITIAL_DISTRIBUTION})

    name: Literal["gg_init"] = "gg_init"
    shape: float = Field(2.0, ge=0.5, le=100)
    gain: float = Field(2.0, gt=0)
    fan: Literal["out", "in"] = "out"

    def init_draw(self, weight: Weight) -> Draw | None:
        return GeneralizedGaussian(self._std(weight), self.shape) if _is_drawn(weight) else None

    def init_rule(self, weight: Weight) -> str | None:
        return f"gg_init: sqrt({self.gain:g} / fan_{self.fan})" if _is_drawn(weight) else None

    def _std(self, weight: Weight) -> float:
        return sqrt(self.gain / (weight.single_fan_out if self.fan == "out" else weight.fan_in))


def _is_drawn(weight: Weight) -> bool:
    """Return whether this is a matrix of a stock model. The methods that add others draw them."""
    return weight.in_block_matrix or weight.role in ("embed", "position", "head")
