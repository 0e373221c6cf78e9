"""The attention of models in training, without a mask of the size of all pairs of tokens.

transformers makes a mask in every forward pass, and reads from the device whether one is needed: the host waits there. It
makes none for an attention function under a name that it does not know. Two are registered here:

    CAUSAL      transformers' own. Without a mask it tells torch's kernel that attention is causal.
    DOCUMENTS   torch's flex_attention within documents. It skips the blocks of tokens of which no pair is in one document.

Ranks that share sequences have a third, which exchanges slices of sequences around one of these (`sequence.py`).

The values are those of the stock implementation, which stays on CPUs for attention within documents, and everywhere for a
model with a sliding window. The names are set on
models in training only. Configurations are saved without them, and exports are stock models.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pretrain.errors import UserError
from pretrain.model.sequence import Attention, SequenceRanks, over_slices, repeats_of_heads

CAUSAL, DOCUMENTS = "evenkeel_causal", "evenkeel_documents"
SLICED, SLICED_MASKED, SLICED_DOCUMENTS = "evenkeel_sliced", "evenkeel_sliced_masked", "evenkeel_sliced_documents"
BLOCK = 128  # tokens, the least that flex_attention's kernels take

_WITH_A_MASK = ("sdpa", "eager")  # implementations that keep documents apart by transformers' mask


def choose_attention(model: PreTrainedModel, documents: bool, flex: bool = False) -> None:
    """Set the attention of a model that is about to be trained.

    Args:
        model: a causal language model of transformers.
        documents: whether attention must end with each document.
        flex: whether flex_attention can be compiled here. Without it, and for a model with dropout in its attention, which
            it does not have, the mask keeps documents apart.

    Raises:
        UserError: the model's implementation would let documents see each other.
    """
    chosen = model.config._attn_implementation
    if documents and chosen not in _WITH_A_MASK:
        raise UserError(
            f"data.document_attention does not go with the attention implementation {chosen}, which lets the documents of "
            f"a batch see each other: take {' or '.join(_WITH_A_MASK)}."
        )
    if chosen != "sdpa" or _sees_a_window(model):
        return
    if not documents:
        model.set_attn_implementation(CAUSAL)
    elif flex and not _attention_dropout(model):
        model.set_attn_implementation(DOCUMENTS)


def share_sequences(model: PreTrainedModel, ranks: SequenceRanks, tensor: int) -> None:
    """Let the attention of a model, after `choose_attention`, exchange the slices of sequences that ranks hold.

    Args:
        model: the model.
        ranks: the ranks that share a sequence, which the model's forward must know as well.
        tensor: how many ranks share the heads of one token.

    Raises:
        UserError: the model's implementation would make a mask for the slice alone.
    """
    chosen = model.config._attn_implementation
    if chosen not in _SLICED:
        raise UserError(
            f"parallel.sequence {ranks.size} does not go with the attention implementation {chosen}, which makes its mask "
            "for the tokens of one rank. Take sdpa."
        )
    name, attend = _SLICED[chosen]
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads) // tensor
    repeats = repeats_of_heads(heads, ranks.size)
    for module in model.modules():
        groups = getattr(module, "num_key_value_groups", None)
        if isinstance(groups, int):
            vars(module)["num_key_value_groups"] = groups // repeats
    AttentionInterface.register(name, over_slices(attend, ranks, repeats))
    model.set_attn_implementation(name)


def refuse_mask(model: PreTrainedModel) -> None:
    """Raise ValueError where a mask, of padding or of documents, would be ignored."""
    if model.config._attn_implementation == CAUSAL:
        raise ValueError(
            "this model attends without a mask. Call set_attn_implementation('sdpa') on it before you give one."
        )


def mask_of_documents(model: PreTrainedModel, positions: torch.Tensor | None) -> BlockMask | torch.Tensor | None:
    """Return the mask that a forward pass must be given, None where the model makes its own or needs none.

    Args:
        model: the model, after `choose_attention`.
        positions: (sequences, seq_len) int64 of whole sequences, which start at 0 again with each document.
    """
    chosen = model.config._attn_implementation
    if positions is None or chosen not in (DOCUMENTS, SLICED_DOCUMENTS, SLICED_MASKED):
        return None
    return pairs_within_documents(positions) if chosen == SLICED_MASKED else document_mask(positions)


def pairs_within_documents(positions: torch.Tensor) -> torch.Tensor:
    """Return the mask of all pairs of tokens, (sequences, 1, seq_len, seq_len) bool, as transformers would make it.

    Args:
        positions: as for `document_mask`.
    """
    documents = (positions == 0).cumsum(1)
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def document_mask(positions: torch.Tensor) -> BlockMask:
    """Return flex_attention's mask for causal attention within documents. Nothing waits for the device.

    torch's `create_block_mask` would look at every pair of tokens. The documents of a sequence follow each other, so the
    first and the last one in each block of tokens say enough.

    Args:
        positions: (sequences, seq_len) int64, which start at 0 again with each document.
    """
    length, device = positions.shape[1], positions.device
    documents = (positions == 0).cumsum(1)

    def sees(sequence: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (documents[sequence, query] == documents[sequence, key]) & (query >= key)

    number = torch.arange(-(-length // BLOCK), device=device)
    first, last = documents[:, number * BLOCK], documents[:, (number * BLOCK + BLOCK - 1).clamp(max=length - 1)]
    earlier = number[:, None] > number
    whole = (first[:, None, :] == last[:, :, None]) & earlier & ((number + 1) * BLOCK <= length)[:, None]
    some = (last[:, None, :] >= first[:, :, None]) & (earlier | torch.eye(len(number), device=device).bool()) & ~whole
    mask = BlockMask.from_kv_blocks(*_listed(some), *_listed(whole), BLOCK, sees, seq_lengths=(length, length))
    mask.ndim = len(mask.shape)  # type: ignore[attr-defined]  # transformers' GPT-2 asks every mask for it
    return mask


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks of keys each block of queries has, and their numbers followed by those of the others."""
    counts = blocks.sum(-1, dtype=torch.int32)
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts.unsqueeze(1), numbers.unsqueeze(1)


def _sees_a_window(model: PreTrainedModel) -> bool:
    """Return whether some layer attends to fewer tokens than there are before it, which transformers' mask says."""
    config = model.config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    shorter = window is not None and window < config.max_position_embeddings
    return shorter and (kinds is None or "sliding_attention" in kinds)


def _attention_dropout(model: PreTrainedModel) -> float:
    return max(getattr(model.config, field, None) or 0.0 for field in ("attention_dropout", "attn_pdrop"))


def _within_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' functions do: (batch, heads, seq_len, head_dim) to (batch, seq_len, heads, head_dim)."""
    if attention_mask is None:  # one document, such as the probe
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **more)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    grouped = key.shape[1] != query.shape[1]
    found = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionInterface.register(DOCUMENTS, _within_documents)

# What a model attends with -> the name of the same over slices of sequences, and the function around which they are exchanged.
_SLICED: dict[str, tuple[str, Attention]] = {
    CAUSAL: (SLICED, sdpa_attention_forward),
    "sdpa": (SLICED_MASKED, sdpa_attention_forward),
    DOCUMENTS: (SLICED_DOCUMENTS, _within_documents),
}
