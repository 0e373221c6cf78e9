"""What a class of transformers does to logits after its head, and two proofs that the loss does the same.

Granite divides its logits by `logits_scaling`, Cohere multiplies them by `logit_scale`, Gemma caps them at
`final_logit_softcapping`. A loss without that would be the loss of another model, and no later check would show it.

Before a run the class is given logits by hand (`require_known_logits`): any class is compared, whatever its fields are
called. At its start the trainer compares the loss of the probe with the cross-entropy of the class's own logits
(`require_own_loss`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENS, _LOGITS = 5, 11  # of the logits that a class is given by hand


@dataclass(frozen=True)
class AfterHead:
    """What a class does to its logits: z ← c tanh(f z / d / c).

    Attributes:
        divisor: d.
        factor: f.
        cap: c, None for no cap.
    """

    divisor: float = 1.0
    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as the class gives them."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def after_head_of(config: PreTrainedConfig) -> AfterHead | None:
    """Return what the class of this configuration does to its logits, by the names of its fields. None: nothing."""
    found = AfterHead(
        divisor=getattr(config, "logits_scaling", None) or 1.0,
        factor=getattr(config, "logit_scale", None) or 1.0,
        cap=getattr(config, "final_logit_softcapping", None),
    )
    return None if found == AfterHead() else found


def require_known_logits(model: PreTrainedModel, after_head: AfterHead | None) -> None:
    """Refuse a class that does anything between its decoder and its logits that the loss would not do.

    The class's forward runs with tensors of random values in place of the outputs of its decoder and its head.

    Args:
        model: a model on the meta device, whose head is `lm_head`.
        after_head: what the loss does.

    Raises:
        UserError: for such a class.
    """
    generator = torch.Generator().manual_seed(0)
    head, decoder = cast("Any", model.get_submodule("lm_head")), cast("Any", model.base_model)
    hidden = torch.randn(1, _TOKENS, head.in_features, generator=generator)
    raw = 30 * torch.randn(1, _TOKENS, _LOGITS, generator=generator)
    read: list[torch.Tensor] = []

    def of_head(given: torch.Tensor) -> torch.Tensor:
        read.append(given)
        return raw.clone()

    decoder.forward = lambda *args, **kwargs: _Decoded(last_hidden_state=hidden)
    head.forward = of_head
    try:
        logits = model(torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False).logits
    finally:
        del decoder.forward, head.forward
    if len(read) != 1 or not torch.equal(read[0], hidden):
        raise UserError(
            f"{type(model).__name__} changes the output of its last norm before its head reads it, and the loss here would "
            "not. Teach `with_loss_head` in pretrain/model/loss.py the change before this family is trained."
        )
    expected = raw if after_head is None else after_head(raw)
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, rtol=1e-5, atol=1e-5):
        raise UserError(
            f"{type(model).__name__} changes the logits after its head in a way that the loss here does not know. Teach "
            "`AfterHead` in pretrain/model/class_logits.py the change before this family is trained."
        )


@torch.no_grad()
def require_own_loss(model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    """Refuse to train a model whose loss is not the cross-entropy of its own logits. Collective under ZeRO-3.

    The model is in evaluation mode for the two passes. Both are NaN or infinite for a model that holds such values, which
    is not judged here.

    Args:
        model: the model, without a wrapper.
        input_ids: (sequences, length) int64, on the model's device.

    Raises:
        UserError: the two differ by more than rounding. Every rank finds the same.
    """
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids, use_cache=False).logits
        targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)
        ranks = getattr(model, "sequence_ranks", None)
        with nullcontext() if ranks is None else ranks.on_whole_sequences():
            trained = model(input_ids, targets=targets)["cross_entropy"].item()
    finally:
        model.train(was_training)
    own = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).item()
    # Logits are rounded to the precision of the model, some up and some down.
    rounding = torch.finfo(logits.dtype).eps * logits.abs().mean(dtype=torch.float32).item()
    if abs(trained - own) > rounding + 1e-4 * max(1.0, abs(own)):
        raise UserError(
            f"the loss that would be trained on is {trained:.4f} on the first training tokens, and the cross-entropy of the "
            f"logits that {type(model).__name__} gives there is {own:.4f}: the model would be trained on another loss than "
            "its own. What it does to logits after its head belongs into `AfterHead` in pretrain/model/class_logits.py."
        )


class _Decoded(BaseModelOutput):
    """A decoder's output that has every further field that a class may read, as None."""

    def __getattr__(self, name: str) -> None:
        return None
