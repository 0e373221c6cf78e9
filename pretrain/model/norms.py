"""The norms that methods train with in place of the stock ones, all of one form, so that methods combine in any order:

    y = c γ (x - m) / sqrt(mean((x - m)²) + eps)      m = 0: RMSNorm;  m = mean(x): LayerNorm without a bias

γ is trained, a gain for each channel or one for all. c is a constant. The product c γ is computed in float32 and then
cast to the precision that forward computes in, so an export that stores c γ multiplies by exactly the same gain. Rounding
is that of Hugging Face's RMSNorm: float32 up to the normalized value, which is cast before the gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model.families import FAMILIES
from pretrain.model.layout import full_shape
from pretrain.model.modeling_evenkeel import SeeDNorm

BLOCK_NORMS = tuple({norm: None for family in FAMILIES.values() for norm in family.norms})
FINAL_NORMS = tuple({family.final_norm: None for family in FAMILIES.values()})


@dataclass(frozen=True)
class NormKind:
    """The form of a norm.

    Attributes:
        eps: the eps of the formula.
        gains: the number of trained gains, the hidden size or 1.
        centred: whether m is the mean of x.
        factor: c.
    """

    eps: float
    gains: int
    centred: bool = False
    factor: float = 1.0


def scaled(gain: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """Return `factor` times a gain or a bias, computed in float32 and cast to its precision.

    It is a product because the last bit of a division by a constant differs between GPUs and CPUs.
    """
    if not isinstance(factor, torch.Tensor) and factor == 1.0:
        return gain
    return (gain.float() * factor).to(gain.dtype)


class ScaledGain(nn.Module):
    """The part of a norm that holds the constant of its gain.

    Attributes:
        factor: c, a number, or a float32 scalar after `take_factor_as_tensor`.
    """

    factor: float | torch.Tensor

    def take_factor_as_tensor(self, device: torch.device) -> None:
        """Hold c as a tensor, for the same result: numbers are part of a compiled block, so each would take its own graph."""
        self.factor = torch.as_tensor(self.factor, dtype=torch.float32, device=device)


class Norm(ScaledGain):
    """A norm of one `NormKind`. Its gain is called `weight`, as in the stock norms."""

    def __init__(self, kind: NormKind) -> None:
        super().__init__()
        self.kind, self.factor = kind, kind.factor
        self.weight = nn.Parameter(torch.ones(kind.gains))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalized values.

        Args:
            hidden: (..., hidden_size) of any float dtype, which the result has too.
        """
        values = hidden.float()
        if self.kind.centred:
            values = values - values.mean(-1, keepdim=True)
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.kind.eps)
        return scaled(self.weight, self.factor) * values.to(hidden.dtype)


class ScaledLayerNorm(ScaledGain, nn.LayerNorm):
    """GPT-2's norm with gain and bias multiplied by a constant."""

    def __init__(self, hidden_size: int, eps: float, factor: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.factor = factor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = (scaled(each, self.factor) for each in (self.weight, self.bias))
        return F.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class ScaledSeeDNorm(ScaledGain, SeeDNorm):
    """SeeDNorm with both terms of its gain, and so its output, multiplied by a constant."""

    def __init__(self, hidden_size: int, eps: float, factor: float) -> None:
        super().__init__(hidden_size, eps)
        self.factor = factor

    def gain(self, share: torch.Tensor) -> torch.Tensor:
        return share * scaled(self.alpha, self.factor) + scaled(self.weight, self.factor)


def is_stream_norm(module: str) -> bool:
    """Return whether the module of this name normalizes the residual stream: in a block or at the end, not in a head."""
    return module.endswith(BLOCK_NORMS) or module in FINAL_NORMS


def stream_norms(model: nn.Module) -> list[str]:
    """Return the names of the model's norms of the residual stream."""
    return [name for name, _ in model.named_modules() if is_stream_norm(name)]


def change_norm(model: nn.Module, name: str, **changes: Any) -> None:
    """Replace an RMSNorm by one of another form.

    Args:
        model: the model.
        name: the name of a stock RMSNorm or a `Norm` in it.
        changes: fields of `NormKind`.

    Raises:
        TypeError: for another kind of module.
    """
    old: Any = model.get_submodule(name)
    if isinstance(old, Norm):
        kind = old.kind
    elif hasattr(old, "variance_epsilon"):
        kind = NormKind(eps=old.variance_epsilon, gains=full_shape(old.weight)[0])
    else:
        raise TypeError(f"{name} is a {type(old).__name__}, not an RMSNorm")
    model.set_submodule(name, Norm(replace(kind, **changes)))
