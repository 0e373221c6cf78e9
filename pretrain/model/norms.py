"""The norms that methods train with in place of the stock ones, all of one form, so that methods combine in any order:

    y = c γ (x - m) / sqrt(mean((x - m)²) + eps)      m = 0: RMSNorm;  m = mean(x): LayerNorm without a bias

γ is trained, a gain for each channel or one for all; c is a constant. The product c γ is made of the gain, in float32,
and then cast to the precision that forward computes in: so an export that stores c γ multiplies by the very same gain.
Rounding is that of Hugging Face's RMSNorm: float32 up to the normalized value, which is cast before the gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model.layout import full_shape
from pretrain.model.modeling_evenkeel import SeeDNorm

BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm", "ln_1", "ln_2")
FINAL_NORMS = ("model.norm", "transformer.ln_f")


@dataclass(frozen=True)
class NormKind:
    """gains: trained gains, the hidden size or 1. centred: subtract the mean. factor: c."""

    eps: float
    gains: int
    centred: bool = False
    factor: float = 1.0


def scaled(gain: torch.Tensor, factor: float) -> torch.Tensor:
    """`factor` times a gain or a bias, computed in float32, in its own precision.

    A product: a GPU divides by a constant otherwise than a CPU does, in the last bit.
    """
    return gain if factor == 1.0 else (gain.float() * factor).to(gain.dtype)


class Norm(nn.Module):
    """The norm of one `NormKind`. Its gain is called `weight`, as in the stock norms."""

    def __init__(self, kind: NormKind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(kind.gains))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (..., hidden_size) of any float dtype, which the result has too."""
        values = hidden.float()
        if self.kind.centred:
            values = values - values.mean(-1, keepdim=True)
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.kind.eps)
        return scaled(self.weight, self.kind.factor) * values.to(hidden.dtype)


class ScaledLayerNorm(nn.LayerNorm):
    """GPT-2's norm, gain and bias times a constant."""

    def __init__(self, hidden_size: int, eps: float, factor: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.factor = factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = (scaled(each, self.factor) for each in (self.weight, self.bias))
        return F.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class ScaledSeeDNorm(SeeDNorm):
    """SeeDNorm, what it gives times a constant: both terms of its gain are."""

    def __init__(self, hidden_size: int, eps: float, factor: float) -> None:
        super().__init__(hidden_size, eps)
        self.factor = factor

    def gain(self, share: torch.Tensor) -> torch.Tensor:
        return share * scaled(self.alpha, self.factor) + scaled(self.weight, self.factor)


def is_stream_norm(module: str) -> bool:
    """Whether the module of this name norms the residual stream: in a block or at the end, not the values of heads."""
    return module.endswith(BLOCK_NORMS) or module in FINAL_NORMS


def stream_norms(model: nn.Module) -> list[str]:
    """The names of the model's norms of the residual stream."""
    return [name for name, _ in model.named_modules() if is_stream_norm(name)]


def change_norm(model: nn.Module, name: str, **changes: float | bool) -> None:
    """Give the RMSNorm `name` of `model`, a stock one or a `Norm`, other fields of its `NormKind`.

    Raises TypeError for another module.
    """
    old = model.get_submodule(name)
    if isinstance(old, Norm):
        kind = old.kind
    elif hasattr(old, "variance_epsilon"):
        kind = NormKind(eps=old.variance_epsilon, gains=full_shape(old.weight)[0])
    else:
        raise TypeError(f"{name} is a {type(old).__name__}, not an RMSNorm")
    model.set_submodule(name, Norm(replace(kind, **changes)))
