"""Sequence parallelism: which ranks share a sequence, and which models can be trained so.

`parallel.sequence: S` lets S ranks read the same batch and hold consecutive slices of its sequences (Ulysses, see
`pretrain/model/sequence.py`). To DeepSpeed they are data-parallel ranks like any other. The loss of each is such that the
mean over all ranks is the loss of the batch, so its mean of gradients is right at every ZeRO stage, and ZeRO shares out the
weights among all of them.

DeepSpeed has such ranks of its own (`UlyssesSPAttentionHF`). docs/scaling.md says why only its exchange is used here.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.model.sequence import SequenceRanks
from pretrain.values import nearest_divisor


def sequence_ranks(config: Config) -> SequenceRanks | None:
    """Return the ranks that share this rank's sequences, None where each reads its own. Collective."""
    tensor, size = config.parallel.tensor, config.parallel.sequence
    if size == 1:
        return None
    from deepspeed.sequence.layer import register_all_to_all_group

    world, rank = dist.get_world_size(), dist.get_rank()
    together = [
        list(range(first + share, first + tensor * size, tensor))
        for first in range(0, world, tensor * size)
        for share in range(tensor)
    ]
    group, _ = dist.new_subgroups_by_enumeration(together)
    assert group is not None, "every rank is in one of the groups"
    name = register_all_to_all_group(group)
    return SequenceRanks(rank // tensor % size, size, partial(_exchanged, name=name))


def _exchanged(sent: torch.Tensor, name: str) -> torch.Tensor:
    """Exchange through DeepSpeed's operator, which torch.compile can differentiate."""
    return torch.ops.deepspeed.dim_zero_all_to_all(sent, name)


def check_heads(config: Config, model_config: PreTrainedConfig) -> None:
    """Raise UserError where the ranks that share a sequence could not get equal shares of the heads of attention."""
    tensor, size = config.parallel.tensor, config.parallel.sequence
    heads = model_config.num_attention_heads // tensor
    if heads % size == 0:
        return
    of_each = f" / parallel.tensor {tensor} = {heads}" if tensor > 1 else ""
    raise UserError(
        f"parallel.sequence {size} does not divide model.num_attention_heads {model_config.num_attention_heads}{of_each}: "
        "attention gives each rank that shares a sequence equally many heads. The nearest size that does is "
        f"{nearest_divisor(heads, size)}."
    )
