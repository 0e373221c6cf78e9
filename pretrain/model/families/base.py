"""The contract of a model family: a record that says what each weight is, and what the blocks have that methods ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a family may have and a method may need, with the sentence of a refusal.
Need = Literal["pre_norm", "rms_norm", "direct_branches", "llama_block"]
NEEDS: Mapping[Need, str] = {
    "pre_norm": "a norm before each sub-layer, which reads the residual stream",
    "rms_norm": "RMSNorm as the only kind of norm",
    "direct_branches": "sub-layers whose outputs are added to the residual stream without a norm in between",
    "llama_block": "the block of a LLaMA: its norms, its attention and its gated MLP, with biases in all of a part or none",
}

# The modules of a block, of a model and of its norms under the names that most classes of transformers share.
LLAMA_ATTENTION: Mapping[str, str] = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
}
LLAMA_MLP: Mapping[str, str] = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
LLAMA_NORMS: Mapping[str, str] = {"input_layernorm": "norm", "post_attention_layernorm": "norm"}
QK_NORMS: Mapping[str, str] = {"self_attn.q_norm": "norm", "self_attn.k_norm": "norm"}
LLAMA_OUTSIDE: Mapping[str, str] = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}


@dataclass(frozen=True)
class Family:
    """A kind of model that can be trained.

    Attributes:
        name: the name in run files, `model.family`: transformers' `model_type`.
        config_class: its configuration. Its fields are the keys of the `model` section.
        trained_class: the name of the class of transformers that is trained, and exported where no method changes it. Its
            head is called `lm_head`.
        in_block: the role of each module of a block that has weights, by its name in the block.
        outside: the role of each other module that has weights, by its name in the model.
        has: what its blocks have that methods may need.
        blocks: the name of the list of blocks.
        norms: the names, in a block, of the norms that read the residual stream.
        final_norm: the name of the norm before the head.
        input_major: the ends of the names of matrices that are stored as (inputs, outputs).
        defaults: maps the fields that the run file gives to values of others, where transformers' default would surprise
            whoever trains from scratch.
        whole_heads: why tensor parallelism cannot cut its attention, None where it can.
    """

    name: str
    config_class: type[PreTrainedConfig]
    trained_class: str
    in_block: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=lambda: LLAMA_OUTSIDE)
    has: frozenset[Need] = frozenset()
    blocks: str = "model.layers"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "model.norm"
    input_major: tuple[str, ...] = ()
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: {}
    whole_heads: str | None = None
