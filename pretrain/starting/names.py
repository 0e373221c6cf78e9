"""The tensor of the source that each weight of a plain model starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pretrain.checkpoints.stored import StoredTensor
from pretrain.errors import UserError
from pretrain.model.families import FAMILIES
from pretrain.model.layout import Weight

_HEAD = "lm_head.weight"
# The keys that decide the shape of a matrix besides hidden_size, by its role.
_KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("embed", "head"), ("vocab_size", "hidden_size")),
    "position": ("max_position_embeddings", "hidden_size"),
    **dict.fromkeys(("q", "o", "qkv"), ("num_attention_heads", "head_dim", "hidden_size")),
    **dict.fromkeys(("k", "v"), ("num_key_value_heads", "head_dim", "hidden_size")),
    **dict.fromkeys(("gate", "up", "down"), ("intermediate_size", "hidden_size")),
}
# Tables that older files store beside the weights, and that every class makes for itself: causal masks, rotary frequencies.
_TABLES = re.compile(r".*\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)")


def tensors_of(
    weights: Sequence[Weight],
    found: Mapping[str, StoredTensor],
    *,
    family: str,
    layers: Sequence[int] | None,
    tied: bool,
    place: str,
) -> dict[str, StoredTensor]:
    """Return the stored tensor of each weight.

    Files may name weights without the prefix of the base model, as GPT-2's do. A head that the run has, and that the source
    ties to its embedding, starts as the embedding.

    Args:
        weights: the weights of the plain model of the run.
        found: the tensors of the source, by name.
        family: the family of both.
        layers: the block of the source, counted from 0, for each block of the run. None: its own.
        tied: whether the source's head is its embedding.
        place: where the source lies, for messages.

    Raises:
        UserError: a weight is not there, has another shape, or the source has one that the run's model lacks.
    """
    blocks = FAMILIES[family].blocks
    stored = {_whole_name(name, blocks.partition(".")[0]): tensor for name, tensor in found.items()}
    if tied:
        stored.pop(_HEAD, None)  # a copy of the embedding
        if any(weight.name == _HEAD for weight in weights):
            embedding = next(module for module, role in FAMILIES[family].outside.items() if role == "embed")
            stored |= {_HEAD: stored[f"{embedding}.weight"]} if f"{embedding}.weight" in stored else {}
    block = re.compile(rf"({re.escape(blocks)}\.)(\d+)(\..+)")

    def name_there(name: str) -> str:
        parts = block.fullmatch(name)
        return f"{parts[1]}{layers[int(parts[2])]}{parts[3]}" if parts and layers is not None else name

    wanted = {weight.name: name_there(weight.name) for weight in weights}
    for weight in weights:
        _check(weight, wanted[weight.name], stored, place)
    for name in sorted(stored.keys() - set(wanted.values())):
        parts = block.fullmatch(name)
        left_out = parts and layers is not None and int(parts[2]) not in layers
        if not left_out and not _TABLES.fullmatch(name):
            raise UserError(f"model.init_from: {place} holds {name}, which the run's model does not have.{_hint(name)}")
    return {name: stored[there] for name, there in wanted.items()}


def _whole_name(name: str, base: str) -> str:
    """Return the name of a weight in the model with a head, of which `base` is the name of the rest."""
    return name if name.startswith((f"{base}.", "lm_head.")) else f"{base}.{name}"


def _check(weight: Weight, name: str, stored: Mapping[str, StoredTensor], place: str) -> None:
    if name not in stored:
        raise UserError(
            f"model.init_from: {place} holds no {name}, which the run's model needs for {weight.name}.{_hint(name)}"
        )
    if stored[name].shape == weight.shape:
        return
    keys = " and ".join(f"model.{key}" for key in _KEYS.get(weight.role, ("hidden_size",)))
    raise UserError(
        f"model.init_from: {stored[name].parts[0].span.file} holds {name} of shape {list(stored[name].shape)}, and the run's "
        f"{weight.name} has {list(weight.shape)}. Leave {keys} out of the run file, or give what the model has."
    )


def _hint(name: str) -> str:
    """Return which key decides whether there is a weight of this name."""
    if name == _HEAD:
        return " model.tie_word_embeddings says whether the head has a matrix of its own."
    if name.endswith(".bias"):
        return " model.attention_bias and model.mlp_bias say which modules have biases."
    return ""
