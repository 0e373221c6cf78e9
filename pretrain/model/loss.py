"""Next-token cross-entropy that never holds the full fp32 logits, and the terms that methods add to it.

The head computes logits, loss and gradients for a few tokens at a time, in the forward pass, so memory is
(chunk, vocabulary) instead of (tokens, vocabulary) and no logits are kept or recomputed for the backward pass. The
loss lives in the head's own forward because under ZeRO-3 a module sees its full weight only there.
(`torch.nn.functional.linear_cross_entropy` does the same but rounds the loss of a bf16 model to bf16: 4.625 or 4.656.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model.reparameterization import Effective, ReparameterizedLinear

CHUNK_LOGITS = 1 << 25  # elements of one chunk's logits: 128 MB in float32
CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class TokenTerm:
    """A term of the loss that is a mean over the tokens that count.

    of_logits: (tokens, vocab_size) float32 logits -> (tokens,). The coefficient is part of it.
    """

    of_logits: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadTerm:
    """A term of the loss that depends on the head's matrix alone.

    of_weight: (vocab_size, hidden_size) float32, as forward multiplies by it -> scalar. The coefficient is part of it.
    """

    of_weight: Callable[[torch.Tensor], torch.Tensor]


LossTerm = TokenTerm | HeadTerm


class LossHead(ReparameterizedLinear):
    """An output head that returns logits, or the loss when it is given targets. Holds no bias.

    terms: what is added to the cross-entropy, by name. cap: c of `c tanh(logits / c)`, None leaves logits as they are.
    gradient_scale: fp16's loss scale. The gradients that forward computes are computed at it: without it they would
    vanish before backward multiplies them by it.
    """

    cap: float | None = None
    gradient_scale: float = 1.0

    def __init__(self, in_features: int, out_features: int, effective: Effective | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, effective=effective)
        self.terms: dict[str, LossTerm] = {}

    def remade(self, effective: Effective) -> LossHead:
        new = LossHead(self.in_features, self.out_features, effective)
        new.cap = self.cap
        return new

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, divisor: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """hidden: (batch, seq_len, hidden_size). targets: (batch, seq_len) token ids, -100 where none counts. divisor:
        scalar, what sums over tokens are divided by; None: the number of targets that count here, which gives means.

        Returns (batch, seq_len, vocab_size) logits; or float32 scalars: `total`, to be minimized, its parts
        `cross_entropy` (mean, in nats) and one for each of the terms, without gradients.
        """
        if targets is None:
            return self._capped(super().forward(hidden))
        weight = self.effective_weight()
        of_tokens = {name: term for name, term in self.terms.items() if isinstance(term, TokenTerm)}
        of_weight = {name: term for name, term in self.terms.items() if isinstance(term, HeadTerm)}
        parts = _ChunkedLoss.apply(
            hidden.flatten(0, -2),
            weight,
            targets.flatten(),
            self._capped,
            tuple(of_tokens.values()),
            tuple(of_weight.values()),
            self.gradient_scale,
            divisor,
        )
        found = dict(zip((CROSS_ENTROPY, *of_tokens, *of_weight), parts.unbind(), strict=True))
        return {"total": sum(found.values()), **{name: value.detach() for name, value in found.items()}}

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class _ChunkedLoss(torch.autograd.Function):
    """Sums over tokens of the cross-entropy and of further terms, divided; gradients are computed chunk by chunk in forward.

    Returns (1 + all terms,); what is differentiated must be their sum. The gradients of all parts are added in float32 and
    rounded once: added to the others' in bf16, the small gradient of a HeadTerm would vanish.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        capped: Callable[[torch.Tensor], torch.Tensor],
        terms: Sequence[TokenTerm],
        head_terms: Sequence[HeadTerm],
        gradient_scale: float,
        divisor: torch.Tensor | None,
    ) -> torch.Tensor:
        with_gradients = any(ctx.needs_input_grad[:2])
        parts = torch.zeros(1 + len(terms), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if with_gradients else None
        weight_gradient = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if with_gradients else None
        )
        divisor = (targets != -100).sum().clamp_min(1) if divisor is None else divisor
        chunk_tokens = max(1, CHUNK_LOGITS // weight.shape[0])
        for first in range(0, len(hidden), chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            with torch.set_grad_enabled(with_gradients):
                some_hidden = hidden[rows].detach().requires_grad_(with_gradients)
                the_weight = weight.detach().requires_grad_(with_gradients)
                logits = capped(F.linear(some_hidden, the_weight).float())
                chunk = _sums(logits, targets[rows], terms) / divisor
                scaled_loss = chunk.sum() * gradient_scale
            parts += chunk.detach()
            if with_gradients:
                hidden_gradient[rows], chunk_gradient = torch.autograd.grad(scaled_loss, (some_hidden, the_weight))
                weight_gradient += chunk_gradient
        for term in head_terms:
            with torch.set_grad_enabled(with_gradients):
                the_weight = weight.detach().float().requires_grad_(with_gradients)
                value = term.of_weight(the_weight)
                scaled_loss = value * gradient_scale
            parts = torch.cat((parts, value.detach().view(1)))
            if with_gradients:
                weight_gradient += torch.autograd.grad(scaled_loss, the_weight)[0]
        if with_gradients:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
            ctx.gradient_scale = gradient_scale
        return parts

    @staticmethod
    def backward(ctx: Any, scales: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = scales[0] / ctx.gradient_scale
        return hidden_gradient * scale, weight_gradient * scale, None, None, None, None, None, None


def _sums(logits: torch.Tensor, targets: torch.Tensor, terms: Sequence[TokenTerm]) -> torch.Tensor:
    """(1 + terms,) sums over the tokens that count."""
    counts = targets != -100
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([cross_entropy, *((term.of_logits(logits) * counts).sum() for term in terms)])


@cache
def with_loss_head(model_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a Hugging Face causal LM whose forward takes `targets` and then returns what `LossHead` does."""

    class Trained(model_class):  # type: ignore[misc, valid-type]
        # The stock class would have tensor parallelism replace the head, and with it the loss. It stays whole.
        _tp_plan = None

        def __init__(self, config) -> None:
            super().__init__(config)
            self.lm_head = LossHead(config.hidden_size, config.vocab_size)
            self.tie_weights()

        def forward(
            self,
            input_ids: torch.Tensor,
            targets: torch.Tensor | None = None,
            divisor: torch.Tensor | None = None,
            **kwargs,
        ):
            if targets is None:
                return super().forward(input_ids, **kwargs)
            hidden = self.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
            return self.lm_head(hidden, targets, divisor)

    Trained.__name__ = Trained.__qualname__ = model_class.__name__
    return Trained
