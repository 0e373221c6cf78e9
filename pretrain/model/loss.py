"""Next-token cross-entropy that never holds the full fp32 logits, and the terms that methods add to it.

The head computes logits, loss and gradients for a few tokens at a time, in the forward pass. So the memory is
(chunk, vocabulary) instead of (tokens, vocabulary), and no logits are kept or recomputed for the backward pass. The loss
is computed in the head's own forward because under ZeRO-3 a module has its full weight only there.
(`torch.nn.functional.linear_cross_entropy` does the same but rounds the loss of a bf16 model to bf16: 4.625 or 4.656.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model.attention import mask_of_documents, refuse_mask
from pretrain.model.class_logits import AfterHead, after_head_of
from pretrain.model.hidden_terms import HiddenTerm, hidden_states, with_hidden_terms
from pretrain.model.reparameterization import Effective, ReparameterizedLinear
from pretrain.model.sequence import SequenceRanks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

CHUNK_LOGITS = 1 << 25  # elements of one chunk's logits, at least: 128 MB in float32
CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class TokenTerm:
    """A term of the loss that is a mean over the tokens that count.

    Attributes:
        of_logits: maps (tokens, vocab_size) float32 logits to (tokens,). The coefficient is part of it.
    """

    of_logits: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadTerm:
    """A term of the loss that depends on the head's matrix alone.

    Attributes:
        of_weight: maps the matrix, (vocab_size, hidden_size) float32 as forward multiplies by it, to a scalar. The
            coefficient is part of it.
    """

    of_weight: Callable[[torch.Tensor], torch.Tensor]


LossTerm = TokenTerm | HeadTerm


class LossHead(ReparameterizedLinear):
    """An output head without a bias that returns logits, or the loss when it is given targets.

    Attributes:
        terms: the terms that are added to the cross-entropy, by name.
        cap: c of `c tanh(logits / c)`. None leaves logits as they are.
        after_head: what the class of the model does to the logits after its head. The loss does it too. Logits come out
            without it, because the class does it to them. None where it does nothing.
        sums: computes the parts of the loss of a few tokens: `sums_of_tokens`, which may be compiled.
        gradient_scale: fp16's loss scale. The gradients that forward computes are computed with it. Without it they would
            underflow before backward multiplies them by it.
        chunk_logits: elements of the logits that are computed at a time.
    """

    cap: float | None = None
    after_head: AfterHead | None = None
    gradient_scale: float = 1.0
    chunk_logits: int = CHUNK_LOGITS

    def __init__(self, in_features: int, out_features: int, effective: Effective | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, effective=effective)
        self.terms: dict[str, LossTerm] = {}
        self.sums = sums_of_tokens

    def remade(self, effective: Effective) -> LossHead:
        new = LossHead(self.in_features, self.out_features, effective)
        new.cap, new.after_head = self.cap, self.after_head
        return new

    @overload
    def forward(
        self, hidden: torch.Tensor, targets: None = None, divisor: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]: ...

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, divisor: torch.Tensor | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return logits, or the loss of the targets.

        Args:
            hidden: (batch, seq_len, hidden_size), of the precision of the weight.
            targets: (batch, seq_len) token ids, -100 where no token counts.
            divisor: a scalar that sums over tokens are divided by. None: the number of targets that count here, which
                gives means.

        Returns:
            Without targets, (batch, seq_len, vocab_size) logits. With targets, float32 scalars by name: `total`, to be
            minimized, and without gradients its parts, `cross_entropy` (mean, in nats) and one for each of the terms.
        """
        if targets is None:
            return capped(super().forward(hidden), self.cap)
        weight = self.effective_weight()
        if not torch.is_grad_enabled():
            weight = weight.detach()  # _ChunkedLoss would take a parameter for a wish for gradients
        of_tokens = {name: term for name, term in self.terms.items() if isinstance(term, TokenTerm)}
        of_weight = {name: term for name, term in self.terms.items() if isinstance(term, HeadTerm)}
        parts = _ChunkedLoss.apply(
            hidden.flatten(0, -2),
            weight,
            targets.flatten(),
            self.sums,
            self.cap,
            self.after_head,
            tuple(of_tokens.values()),
            tuple(of_weight.values()),
            self.gradient_scale,
            divisor,
            max(1, self.chunk_logits // self.out_features),
        )
        by_name = dict(zip((CROSS_ENTROPY, *of_tokens, *of_weight), parts.unbind(), strict=True))
        total = cast("torch.Tensor", sum(by_name.values()))
        return {"total": total, **{name: value.detach() for name, value in by_name.items()}}


class _ChunkedLoss(torch.autograd.Function):
    """Divided sums over tokens of the cross-entropy and of further terms, with gradients computed in forward, by chunks.

    Returns (1 + all terms,) float32. Only their sum may be differentiated. The gradients of all parts are added in float32
    and rounded once. In bf16 the small gradient of a HeadTerm would vanish beside the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        sums: Callable[..., torch.Tensor],
        cap: float | None,
        after_head: AfterHead | None,
        terms: Sequence[TokenTerm],
        head_terms: Sequence[HeadTerm],
        gradient_scale: float,
        divisor: torch.Tensor | None,
        chunk_tokens: int,
    ) -> torch.Tensor:
        with_gradients = any(ctx.needs_input_grad[:2])
        parts = torch.zeros(1 + len(terms), dtype=torch.float32, device=hidden.device)
        gradients = (torch.zeros_like(hidden), _float32_zeros_like(weight)) if with_gradients else None
        divisor = count_targets(targets) if divisor is None else divisor
        for first in range(0, len(hidden), chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            product = F.linear(hidden[rows], weight).requires_grad_(with_gradients)
            with torch.set_grad_enabled(with_gradients):
                chunk = sums(product, targets[rows], cap, terms, after_head) / divisor
                scaled_loss = chunk.sum() * gradient_scale
            parts += chunk.detach()
            if gradients is not None:
                of_hidden, of_weight = gradients
                (of_product,) = torch.autograd.grad(scaled_loss, product)
                of_hidden[rows] = of_product @ weight
                _add_product(of_weight, of_product.t(), hidden[rows])
        for term in head_terms:
            with torch.set_grad_enabled(with_gradients):
                the_weight = weight.detach().float().requires_grad_(with_gradients)
                value = term.of_weight(the_weight)
                scaled_loss = value * gradient_scale
            parts = torch.cat((parts, value.detach().view(1)))
            if gradients is not None:
                _, of_weight = gradients
                of_weight += torch.autograd.grad(scaled_loss, the_weight)[0]
        if gradients is not None:
            of_hidden, of_weight = gradients
            ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype))
            ctx.gradient_scale = gradient_scale
        return parts

    @staticmethod
    def backward(ctx: Any, scales: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        scale = scales[0] / ctx.gradient_scale
        return of_hidden * scale, of_weight * scale, *[None] * 9


def _float32_zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a product of two matrices to the float32 `total`, without rounding it first where the device can do so."""
    if _adds_unrounded(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


@cache
def _adds_unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of matrices of `dtype` to a float32 matrix. Tried with one, once."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:  # CPUs cannot, and older versions want `total` to be of `dtype`
        return False
    return bool((total == 17).all())


def sums_of_tokens(
    product: torch.Tensor,
    targets: torch.Tensor,
    cap: float | None,
    terms: Sequence[TokenTerm],
    after_head: AfterHead | None = None,
) -> torch.Tensor:
    """Return the sums of the cross-entropy and of the terms over the tokens that count: (1 + terms,) float32.

    Args:
        product: (tokens, vocab_size), the logits before the cap.
        targets: (tokens,) token ids, -100 where no token counts.
        cap: as in `LossHead`.
        terms: the terms of tokens.
        after_head: as in `LossHead`.
    """
    logits = capped(product.float(), cap)
    if after_head is not None:
        logits = after_head(logits)
    counts = targets != -100
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([cross_entropy, *((term.of_logits(logits) * counts).sum() for term in terms)])


def count_targets(targets: torch.Tensor) -> torch.Tensor:
    """Return how many targets count, at least 1: an int64 scalar."""
    return (targets != -100).sum().clamp_min(1)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return `cap tanh(logits / cap)`, the logits themselves where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@cache
def with_loss_head(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a Hugging Face causal LM with a `LossHead`.

    Its forward takes `targets` and a `divisor` besides the stock arguments, and with targets returns what `LossHead` does.
    All arguments are of whole sequences. Where ranks share them, each computes the loss of its slice: the mean of the
    results over these ranks is the loss of the sequences. Logits are computed by each of these ranks for whole sequences.
    """

    class Trained(model_class):  # type: ignore[misc, valid-type]  # a base class that is only known at run time
        # The stock class would have tensor parallelism replace the head, and with it the loss. It stays whole.
        _tp_plan = None
        sequence_ranks: SequenceRanks | None = None

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.lm_head = LossHead(config.hidden_size, config.vocab_size)
            self.lm_head.after_head = after_head_of(config)
            self.hidden_terms: dict[str, HiddenTerm] = {}
            self.tie_weights()

        def forward(
            self,
            input_ids: torch.Tensor,
            targets: torch.Tensor | None = None,
            divisor: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> ModelOutput | dict[str, torch.Tensor]:
            mask = mask_of_documents(self, kwargs.get("position_ids"))
            if mask is not None:
                kwargs["attention_mask"] = mask
            if kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
                refuse_mask(self)
            ranks = self.sequence_ranks
            if targets is None:
                with nullcontext() if ranks is None else ranks.on_whole_sequences():
                    return super().forward(input_ids, **kwargs)
            if ranks is not None and not ranks.whole:
                divisor = (count_targets(targets) if divisor is None else divisor) / ranks.size
                input_ids, targets, kwargs["position_ids"] = ranks.slice_of(
                    input_ids, targets, kwargs.get("position_ids")
                )
            if divisor is None:
                divisor = count_targets(targets)
            with hidden_states(self, wanted=bool(self.hidden_terms)) as states:
                hidden = self.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
            losses = self.lm_head(hidden, targets, divisor)
            return with_hidden_terms(losses, self.hidden_terms, states, targets != -100, divisor)

    Trained.__name__ = Trained.__qualname__ = model_class.__name__
    return Trained


def hidden_terms_of(model: nn.Module) -> dict[str, HiddenTerm]:
    """Return the terms on hidden states of a model whose class `with_loss_head` made, to be changed in place."""
    return cast("dict[str, HiddenTerm]", model.hidden_terms)


def loss_head(model: nn.Module) -> LossHead:
    """Return the head of a model whose class `with_loss_head` made."""
    head = model.get_submodule("lm_head")
    assert isinstance(head, LossHead)
    return head
