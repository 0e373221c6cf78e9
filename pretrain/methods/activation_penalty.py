"""Activation penalty: hold down the residual stream itself.

    L += coefficient · mean over blocks l and tokens t of |h_l,t|² / d

h_l is the stream after block l and d its width, so the mean is that of a squared activation. Pre-norm blocks read the
stream through a norm, so only this term, and what rounding makes of large numbers, sees its scale. Tokens count that count
in the cross-entropy.

Source: Merity, McCann and Socher 2017, "Revisiting Activation Regularization for Language RNNs" (arXiv 1708.01009), on the
last layer's output of an LSTM, with the coefficient 2. Here it is the mean over all blocks, and the default is small,
because a decoder's stream grows with depth. No paper gives one for decoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from pretrain.methods.base import Method
from pretrain.model.hidden_terms import HiddenTerm
from pretrain.model.layout import Weight


class ActivationPenalty(Method):
    """Activation penalty. The weights stay plain, so nothing is left to fold.

    Attributes:
        coefficient: The factor of the term in the loss.
    """

    name: Literal["activation_penalty"] = "activation_penalty"
    coefficient: float = Field(1e-4, gt=0)

    def hidden_terms(self) -> Mapping[str, HiddenTerm]:
        return {self.name: HiddenTerm(self._of_hidden)}

    def training_rule(self, weight: Weight) -> str | None:
        writes_to_the_stream = weight.role in {"o", "down"} and weight.fan_in
        return f"activation_penalty: + {self.coefficient:g} x mean(h^2)" if writes_to_the_stream else None

    def _of_hidden(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Return the term of each token, (tokens,), for the states after one block, (tokens, hidden_size)."""
        return self.coefficient / self.run.layers * states.square().mean(-1)
