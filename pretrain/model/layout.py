"""The layout of a model: the role of each weight, its layer and its fans, from its exact Hugging Face name.

Methods and monitors use the layout instead of matching substrings, so a weight is never skipped by accident: a name that
is in no table is an error. Shapes come from the layout too, because under ZeRO-3 a parameter's own `shape` is a
zero-length placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast

import torch
from torch import nn

from pretrain.errors import UserError
from pretrain.model.families import FAMILIES

MatrixRole = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down"]
MATRIX_ROLES: tuple[MatrixRole, ...] = ("q", "k", "v", "qkv", "o", "gate", "up", "down")

# What methods add to the modules of the families.
_OF_METHODS_IN_BLOCK = {
    "self_attn.q_norm": "norm",
    "self_attn.k_norm": "norm",
    "attn_read": "query",
    "mlp_read": "query",
    "output_read": "query",
}
_OF_METHODS_OUTSIDE = {"model.embed_projection": "projection", "model.head_projection": "projection"}


def _merged(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return one table of roles by name, so that a weight is described by its name alone.

    Raises:
        ValueError: two families give a module of one name two roles.
    """
    merged: dict[str, str] = {}
    for table in tables:
        for module, role in table.items():
            if merged.setdefault(module, role) != role:
                raise ValueError(f"pretrain/model/families: '{module}' is both {merged[module]} and {role}")
    return merged


_IN_BLOCK = _merged([_OF_METHODS_IN_BLOCK, *(family.in_block for family in FAMILIES.values())])
_OUTSIDE = _merged([_OF_METHODS_OUTSIDE, *(family.outside for family in FAMILIES.values())])
_LISTS_OF_BLOCKS = sorted({family.blocks for family in FAMILIES.values()})
_BLOCK = re.compile(rf"(?:{'|'.join(map(re.escape, _LISTS_OF_BLOCKS))})\.(\d+)\.(.+)")

# The role of a weight by the last part of its name. None: the role of its module.
_KINDS: dict[str, str | None] = {
    "weight": None,
    "bias": "bias",
    "weight_scale": "scale",
    "alpha": "alpha",
    "beta": "beta",
    "query": "query",
    "norm_weight": "norm",
    "norm_bias": "bias",
}

_INPUT_MAJOR = tuple(end for family in FAMILIES.values() for end in family.input_major)


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, described without its values.

    Attributes:
        name: the Hugging Face name (with zero-based block numbers).
        role: q, k, v, qkv, o, gate, up, down, embed, position, head, norm, bias, scale (trained factors of a stored
            matrix), alpha or beta (vectors of a norm whose gain depends on the token), query (scores the outputs of
            sub-layers), or projection (square, between the blocks and the embedding or the head).
        layer: the number of its block, counted from 1 as in the papers. None outside the blocks.
        shape: the shape of the full weight, whatever piece this rank owns.
        fan_in: the number of inputs of a matrix, 0 for vectors.
        fan_out: the number of outputs of a matrix, 0 for vectors.
        padding_row: the row of an embedding that stands for padding (torch's `padding_idx`). It starts at 0, and looking
            it up gives it no gradient. None where there is none.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    padding_row: int | None = None

    @property
    def numel(self) -> int:
        """The number of elements of the full weight."""
        return prod(self.shape)

    @property
    def depth(self) -> int:
        """The number l of its block, counted from 1.

        Raises:
            ValueError: for a weight outside the blocks.
        """
        if self.layer is None:
            raise ValueError(f"{self.name} is in no block")
        return self.layer

    @property
    def single_fan_out(self) -> int:
        """The number of outputs of one matrix: GPT-2's fused qkv holds three."""
        return self.fan_out // 3 if self.role == "qkv" else self.fan_out

    @property
    def in_block_matrix(self) -> bool:
        """True for the matrices of the decoder blocks, which LIR and TVR act on."""
        return self.layer is not None and self.role in MATRIX_ROLES

    @property
    def input_major(self) -> bool:
        """True for matrices that are stored as (inputs, outputs)."""
        return self.name.endswith(_INPUT_MAJOR)


def role_and_layer(name: str) -> tuple[str, int | None]:
    """Return the role of a weight and the number of its block, counted from 1 (None outside the blocks).

    Raises:
        UserError: for a name that is in no table here.
    """
    module, _, kind = name.rpartition(".")
    if block := _BLOCK.fullmatch(module):
        layer, role = int(block[1]) + 1, _IN_BLOCK.get(block[2])
    else:
        layer, role = None, _OUTSIDE.get(module)
    if role is None or kind not in _KINDS:
        raise UserError(
            f"the model has a weight called '{name}' whose role is unknown. No method could say what it does to it; "
            "add its module to the tables of its family in pretrain/model/families."
        )
    return _KINDS[kind] or role, layer


def describe(name: str, shape: Iterable[int]) -> Weight:
    """Return the `Weight` of this name and full shape.

    Raises:
        UserError: for a name that is in no table here.
    """
    shape = tuple(shape)
    role, layer = role_and_layer(name)
    fan_in = fan_out = 0
    if len(shape) == 2:
        fan_out, fan_in = shape
        if name.endswith(_INPUT_MAJOR):
            fan_in, fan_out = shape
    return Weight(name, role, layer, shape, fan_in, fan_out)


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a whole parameter, also where ZeRO-3 holds a placeholder for it or AutoTP has cut it."""
    uncut = getattr(parameter, "ds_autotp_universal_checkpoint_meta", {}).get("logical_shape")
    return tuple(uncut) if uncut else tuple(getattr(parameter, "ds_shape", parameter.shape))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a Hugging Face model, the first one first."""
    base = cast("Any", model).base_model
    names = (name.rpartition(".")[2] for name in _LISTS_OF_BLOCKS)
    return list(next(getattr(base, name) for name in names if hasattr(base, name)))


def embedding_of(model: nn.Module, module: str) -> nn.Embedding:
    """Return the embedding of this name in `model`."""
    embedding = model.get_submodule(module)
    assert isinstance(embedding, nn.Embedding)  # by its role
    return embedding


def describe_model(model: nn.Module) -> list[Weight]:
    """Return every weight of `model` in the order of its definition. A tied weight appears once, under its first name."""
    weights = [describe(name, full_shape(parameter)) for name, parameter in model.named_parameters()]
    return [
        replace(weight, padding_row=embedding_of(model, weight.name.removesuffix(".weight")).padding_idx)
        if weight.role == "embed"
        else weight
        for weight in weights
    ]
