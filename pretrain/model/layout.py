"""What each weight IS: its role, its layer and its fans, from its exact Hugging Face name.

Methods and monitors ask the layout instead of matching substrings, so a weight is never skipped by accident:
a name that no table knows is an error. Shapes come from the layout too, because under ZeRO-3 a parameter's own
`shape` is a zero-length placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch

from pretrain.errors import UserError

MATRIX_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "down")

_BLOCK = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")

_IN_BLOCK = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "ln_1": "norm",
    "ln_2": "norm",
    "self_attn.q_norm": "norm",
    "self_attn.k_norm": "norm",
    "attn_read": "query",
    "mlp_read": "query",
    "output_read": "query",
}

_OUTSIDE = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "transformer.wte": "embed",
    "transformer.wpe": "position",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    "model.embed_projection": "projection",
    "model.head_projection": "projection",
}

# What the last part of a name makes of its module's role; None keeps it.
_KINDS = {
    "weight": None,
    "bias": "bias",
    "weight_scale": "scale",
    "alpha": "alpha",
    "beta": "beta",
    "query": "query",
    "norm_weight": "norm",
    "norm_bias": "bias",
}

# GPT-2's Conv1D stores its weight as [in, out], nn.Linear as [out, in].
_INPUT_MAJOR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, described without its values.

    name: its Hugging Face name (zero-based block numbers).
    role: q, k, v, qkv, o, gate, up, down, embed, position, head, norm, bias, scale (trained factors of a stored matrix),
    alpha or beta (what makes a norm's gain depend on the token), query (what scores sub-layers' outputs), projection
    (square, between the blocks and the embedding or the head).
    layer: the block it belongs to, counted from 1 as in the papers; None outside the blocks.
    shape: the FULL shape, whatever piece this rank owns.
    fan_in, fan_out: of a matrix; None for vectors.
    padding_row: the row of an embedding that stands for padding (torch's `padding_idx`): it starts at 0, and looking it up
    gives it no gradient. None where there is none.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    fan_in: int | None
    fan_out: int | None
    padding_row: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def single_fan_out(self) -> int | None:
        """The outputs of one matrix: GPT-2's fused qkv holds three."""
        return self.fan_out // 3 if self.role == "qkv" else self.fan_out

    @property
    def in_block_matrix(self) -> bool:
        """True for the 2-D weights of the decoder blocks, which LIR and TVR act on."""
        return self.layer is not None and self.role in MATRIX_ROLES

    @property
    def input_major(self) -> bool:
        """True for matrices that are stored as (inputs, outputs)."""
        return self.name.endswith(_INPUT_MAJOR)


def role_and_layer(name: str) -> tuple[str, int | None]:
    """The role of the weight called `name` and its block counted from 1 (None outside the blocks).

    Raises UserError for a name that no table here knows.
    """
    module, _, kind = name.rpartition(".")
    if block := _BLOCK.fullmatch(module):
        layer, role = int(block[1]) + 1, _IN_BLOCK.get(block[2])
    else:
        layer, role = None, _OUTSIDE.get(module)
    if role is None or kind not in _KINDS:
        raise UserError(
            f"the model has a weight called '{name}' whose role is unknown. No method could say what it does to it; "
            "add its module to the tables in pretrain/model/layout.py."
        )
    return _KINDS[kind] or role, layer


def describe(name: str, shape: Iterable[int]) -> Weight:
    """The `Weight` called `name` with full shape `shape`. Raises UserError for an unknown name."""
    shape = tuple(shape)
    role, layer = role_and_layer(name)
    fan_in = fan_out = None
    if len(shape) == 2:
        fan_out, fan_in = shape
        if name.endswith(_INPUT_MAJOR):
            fan_in, fan_out = shape
    return Weight(name, role, layer, shape, fan_in, fan_out)


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO-3 has replaced it by a placeholder or AutoTP has cut it."""
    uncut = getattr(parameter, "ds_autotp_universal_checkpoint_meta", {}).get("logical_shape")
    return tuple(uncut or getattr(parameter, "ds_shape", parameter.shape))


def describe_model(model: torch.nn.Module) -> list[Weight]:
    """Every weight of `model` in the order of its definition; a tied weight appears once, under its first name."""
    found = [describe(name, full_shape(parameter)) for name, parameter in model.named_parameters()]
    return [
        replace(weight, padding_row=model.get_submodule(weight.name.removesuffix(".weight")).padding_idx)
        if weight.role == "embed"
        else weight
        for weight in found
    ]
