"""Modules that multiply by a function of their stored weight, W̄ = f(W, s), with trained factors s or without.

f is computed in float32 on the weight, then cast to the precision that forward computes in. So an export that stores
f(W, s) computes exactly the same (pretrain/methods/*: `fold`). Three things make it work on sharded weights:

- W and s are parameters of one module, because under ZeRO-3 a module has its full weights only in its own forward.
- W̄ is computed again in the backward pass instead of being kept from forward to backward. If they were kept, the W̄ of
  all modules would be a full copy of the model on every rank.
- Under bf16 and fp16, s itself would be rounded to 8 or 11 bits. Forward uses `exact_scale`, float32, instead, when
  `follow_masters` has fetched it from the optimizer. Gradients still go to s.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

SCALE = ".weight_scale"  # the name of the factors, after that of the module


class Effective:
    """The function f of one module. By default there are no factors, and biases stay as they are.

    Attributes:
        bias_factor: the factor that forward multiplies the bias beside the weight by, in float32.
    """

    bias_factor: float = 1.0

    def scale_shape(self, outputs: int) -> tuple[int, ...] | None:
        """Return the shape of the trained factors s for a matrix of so many outputs. None where there are none."""

    def advance(self, weight: torch.Tensor) -> None:
        """Update the state of f. Called in each forward pass of training before W̄ is computed, also in recomputation.

        Args:
            weight: (outputs, inputs), however the module stores it, in any precision, without gradients.
        """

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Return W̄, differentiable.

        Args:
            weight: W, (outputs, inputs) float32, however the module stores it.
            scale: s, float32. None where there are no factors.
        """
        raise NotImplementedError


class Multiple(Effective):
    """W̄ = c W with a constant c, which multiplies the bias too if `with_bias`."""

    def __init__(self, factor: float, with_bias: bool = False) -> None:
        self.factor = factor
        self.bias_factor = factor if with_bias else 1.0

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return weight * self.factor


def applied(
    effective: Effective, weight: torch.Tensor, scale: torch.Tensor | None = None, input_major: bool = False
) -> torch.Tensor:
    """Return W̄ in float32. Forward and fold both call this, so that they agree to the bit.

    Args:
        effective: f.
        weight: W, (outputs, inputs), or (inputs, outputs) if `input_major`. W̄ has the same shape.
        scale: s, float32. None where there are no factors.
        input_major: whether the weight is stored as (inputs, outputs).
    """
    result = effective(_outputs_first(weight.float(), input_major), scale)
    return result.T if input_major else result


def applied_to_bias(effective: Effective, bias: torch.Tensor) -> torch.Tensor:
    """Return the bias that forward adds, in the precision of the stored one."""
    return bias if effective.bias_factor == 1.0 else (bias.float() * effective.bias_factor).to(bias.dtype)


def _outputs_first(weight: torch.Tensor, input_major: bool) -> torch.Tensor:
    return weight.T if input_major else weight


class Reparameterized(nn.Module):
    """The common part of the modules below.

    Attributes:
        input_major: whether the weight is stored as (inputs, outputs).
        effective: f. None: forward multiplies by the stored weight.
        weight_scale: s, if f has factors.
        exact_scale: s in float32, on the device of the module, once `follow_masters` has fetched it.
    """

    # The stock classes declare these two in different ways: a parameter, and a parameter or None.
    weight: Any
    bias: Any
    input_major = False

    def reparameterize(self, effective: Effective | None, outputs: int) -> None:
        """Add the factors. Call it in `__init__`, where ZeRO-3 partitions the new parameter."""
        self.effective = effective
        shape = effective.scale_shape(outputs) if effective else None
        self.weight_scale = None if shape is None else nn.Parameter(torch.ones(shape))
        self.exact_scale: torch.Tensor | None = None

    def effective_weight(self) -> torch.Tensor:
        """Return W̄ in the shape and precision of the stored weight. Keeps only W and s for the backward pass."""
        if self.effective is None:
            return self.weight
        self._advance(self.effective)
        return _EffectiveWeight.apply(self, self.weight, self.weight_scale)

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden W̄ᵀ + bias. Keeps only `hidden`, W and s for the backward pass."""
        assert self.effective is not None
        self._advance(self.effective)
        bias = self.bias if self.bias is None else applied_to_bias(self.effective, self.bias)
        if torch.compiler.is_compiling():
            # The compiler cannot trace _Product. A checkpoint makes it compute W̄ again in the backward pass.
            made = checkpoint(self._traced_weight, self.weight, self.weight_scale, use_reentrant=False)
            return self.multiply(hidden, cast("torch.Tensor", made), bias)
        return _Product.apply(self, hidden, self.weight, self.weight_scale, bias)

    def multiply(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return what the stock module makes of `hidden`, to the bit."""
        raise NotImplementedError

    def _advance(self, effective: Effective) -> None:
        if self.training:
            effective.advance(_outputs_first(self.weight.detach(), self.input_major))

    def _traced_weight(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Return W̄, differentiable by autograd alone."""
        return self._compute(weight, None if scale is None else self._differentiable_scale(scale))

    def _differentiable_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the factors as forward uses them, with a gradient for s."""
        if self.exact_scale is None:
            return scale.float()
        return self.exact_scale + (scale - scale.detach()).float()

    def _compute(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Return W̄ from the stored weight and float32 factors."""
        assert self.effective is not None
        return applied(self.effective, weight, scale, self.input_major).to(weight.dtype)

    def _scale_value(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        """Return the factors as forward uses them."""
        if scale is None:
            return None
        return scale.float() if self.exact_scale is None else self.exact_scale


class ReparameterizedLinear(Reparameterized, nn.Linear):
    """`nn.Linear` with W̄."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, effective: Effective | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.reparameterize(effective, out_features)

    def remade(self, effective: Effective) -> ReparameterizedLinear:
        """Return a new module of this kind and size that computes with `effective`."""
        return ReparameterizedLinear(self.in_features, self.out_features, self.bias is not None, effective)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight, self.bias) if self.effective is None else self.product(hidden)

    def multiply(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(hidden, weight, bias)


class ReparameterizedConv1D(Reparameterized, Conv1D):
    """GPT-2's `Conv1D` with W̄."""

    input_major = True

    def __init__(self, nf: int, nx: int, effective: Effective) -> None:
        super().__init__(nf, nx)
        self.reparameterize(effective, nf)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.product(hidden)

    def multiply(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is not None  # a Conv1D has one
        flat = torch.addmm(bias, hidden.view(-1, hidden.size(-1)), weight)
        return flat.view(*hidden.shape[:-1], self.nf)


class ReparameterizedEmbedding(Reparameterized, nn.Embedding):
    """`nn.Embedding` with W̄, made of the rows that are looked up: f must treat all rows in one way, each by itself."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, effective: Effective) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.reparameterize(effective, num_embeddings)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.effective is not None
        rows = super().forward(ids)
        scale = None if self.weight_scale is None else self._differentiable_scale(self.weight_scale)
        return self.effective(rows.float(), scale).to(rows.dtype)


class _MadeAgain:
    """W̄, computed again for the backward pass, and the graph that leads from its gradient to those of W and s."""

    def __init__(self, module: Reparameterized, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
        self.scale, value = scale, module._scale_value(scale)
        self.leaves = [leaf.detach().requires_grad_() for leaf in (weight, value) if leaf is not None]
        with torch.enable_grad():
            self.made = module._compute(self.leaves[0], self.leaves[1] if scale is not None else None)

    def gradients(self, of_made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of W and s from that of W̄."""
        of_weight, *rest = torch.autograd.grad(self.made, self.leaves, of_made)
        return of_weight, None if self.scale is None else rest[0].to(self.scale.dtype)


class _EffectiveWeight(torch.autograd.Function):
    """W̄ as a tensor, of which nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, module: Reparameterized, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(weight, scale)
        return module._compute(weight, module._scale_value(scale))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        return None, *_MadeAgain(ctx.module, *ctx.saved_tensors).gradients(gradient)


class _Product(torch.autograd.Function):
    """hidden W̄ᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        module: Reparameterized,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.module, ctx.has_bias = module, bias is not None
        ctx.save_for_backward(hidden, weight, scale)
        return module.multiply(hidden, module._compute(weight, module._scale_value(scale)), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        again = _MadeAgain(ctx.module, weight, scale)
        rows, inputs, made = gradient.flatten(0, -2), hidden.flatten(0, -2), again.made.detach()
        if ctx.module.input_major:
            of_hidden, of_made = gradient @ made.T, inputs.T @ rows
        else:
            of_hidden, of_made = gradient @ made, rows.T @ inputs
        return None, of_hidden, *again.gradients(of_made), rows.sum(0) if ctx.has_bias else None


def reparameterize(model: nn.Module, name: str, effective: Effective) -> None:
    """Replace a module by one that computes with a function of its weight. A tied weight must be tied again afterwards.

    Args:
        model: the model.
        name: the name of an nn.Linear, a Conv1D, an nn.Embedding or the head in it.
        effective: the function.

    Raises:
        TypeError: for another kind of module.
    """
    old = model.get_submodule(name)
    new: nn.Module
    if isinstance(old, ReparameterizedLinear):
        new = old.remade(effective)
    elif isinstance(old, nn.Linear):
        new = ReparameterizedLinear(old.in_features, old.out_features, old.bias is not None, effective)
    elif isinstance(old, Conv1D):
        new = ReparameterizedConv1D(old.nf, old.nx, effective)
    elif isinstance(old, nn.Embedding):
        new = ReparameterizedEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, effective)
    else:
        raise TypeError(f"{name} is a {type(old).__name__}, which has no weight that could be reparameterized")
    model.set_submodule(name, new)
