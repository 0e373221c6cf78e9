"""Next-token cross-entropy that never holds the full fp32 logits.

The head computes logits, loss and gradients for a few tokens at a time, in the forward pass, so memory is
(chunk, vocabulary) instead of (tokens, vocabulary) and no logits are kept or recomputed for the backward pass. The
loss lives in the head's own forward because under ZeRO-3 a module sees its full weight only there.
(`torch.nn.functional.linear_cross_entropy` does the same but rounds the loss of a bf16 model to bf16: 4.625 or 4.656.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 25  # elements of one chunk's logits: 128 MB in float32


class LossHead(nn.Linear):
    """An output head that returns logits, or the loss when it is given targets. Holds no bias.

    gradient_scale: fp16's loss scale. The gradients that forward computes are computed at it: without it they would
    vanish before backward multiplies them by it.
    """

    gradient_scale: float = 1.0

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """hidden: (batch, seq_len, hidden_size). targets: (batch, seq_len) token ids, -100 where none counts.

        Returns (batch, seq_len, vocab_size) logits, or the mean cross-entropy in nats as a float32 scalar.
        """
        if targets is None:
            return super().forward(hidden)
        return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), self.weight, targets.flatten(), self.gradient_scale)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `F.linear(hidden, weight)` whose gradients are computed chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient_scale: float
    ) -> torch.Tensor:
        with_gradients = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if with_gradients else None
        weight_gradient = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if with_gradients else None
        )
        counted = (targets != -100).sum().clamp_min(1)
        chunk_tokens = max(1, CHUNK_LOGITS // weight.shape[0])
        for first in range(0, len(hidden), chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            with torch.set_grad_enabled(with_gradients):
                some_hidden = hidden[rows].detach().requires_grad_(with_gradients)
                the_weight = weight.detach().requires_grad_(with_gradients)
                chunk_loss = F.cross_entropy(F.linear(some_hidden, the_weight).float(), targets[rows], reduction="sum")
                chunk_loss = chunk_loss / counted
                scaled_loss = chunk_loss * gradient_scale
            loss += chunk_loss.detach()
            if with_gradients:
                hidden_gradient[rows], chunk_gradient = torch.autograd.grad(scaled_loss, (some_hidden, the_weight))
                weight_gradient += chunk_gradient
        if with_gradients:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
            ctx.gradient_scale = gradient_scale
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scale / ctx.gradient_scale
        return hidden_gradient * scale, weight_gradient * scale, None, None


def with_loss_head(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a Hugging Face causal LM whose forward takes `targets` and then returns the loss."""

    class Trained(model_class):  # type: ignore[misc, valid-type]
        # The stock class would have tensor parallelism replace the head, and with it the loss. It stays whole.
        _tp_plan = None

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
