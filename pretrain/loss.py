"""Next-token cross-entropy that never holds the full fp32 logits.

The head computes logits, loss and gradients for a few tokens at a time (`torch.nn.functional.linear_cross_entropy`),
so memory is (chunk, vocabulary) instead of (tokens, vocabulary). The loss lives in the head's own forward because
under ZeRO-3 a module sees its full weight only there.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class LossHead(nn.Linear):
    """An output head that returns logits, or the loss when it is given targets. Holds no bias."""

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden: (batch, seq_len, hidden_size). targets: (batch, seq_len) token ids, -100 where none counts.

        Returns (batch, seq_len, vocab_size) logits, or the mean cross-entropy in nats as a float32 scalar.
        """
        if targets is None:
            return super().forward(hidden)
        loss = F.linear_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            targets.flatten(),
            options=nn.LinearCrossEntropyOptions(acc_policy="auto" if hidden.is_cuda else "accurate"),
        )
        return loss.float()


def with_loss_head(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a Hugging Face causal LM whose forward takes `targets` and then returns the loss."""

    class Trained(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, config) -> None:
            super().__init__(config)
            self.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
            self.tie_weights()

        def forward(self, input_ids: torch.Tensor, targets: torch.Tensor | None = None, **kwargs):
            if targets is None:
                return super().forward(input_ids, **kwargs)
            hidden = self.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
            return self.lm_head(hidden, targets)

    Trained.__name__ = Trained.__qualname__ = model_class.__name__
    return Trained
