"""The number of logits that the loss holds at a time: more on a GPU with more free memory.

A chunk of the logits costs a reading of the head's matrix and of its float32 gradient. On a GPU large chunks also make the
kernels fewer and longer. On a CPU small ones stay in the cache.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pretrain.model.loss import CHUNK_LOGITS

_LARGEST = 1 << 28
_BYTES = 20  # of a logit: in the weights' precision, in float32, capped, its logarithm of a share, and two gradients
_SHARE = 20  # the share of the free memory, as its inverse


def chunk_for(free_bytes: int) -> int:
    """Return the elements of a chunk for a device with so much memory left: a power of two from 2^25 to 2^28."""
    elements = free_bytes // (_SHARE * _BYTES)
    return min(_LARGEST, max(CHUNK_LOGITS, 1 << max(0, elements.bit_length() - 1)))


def agreed_chunk(device: torch.device) -> int:
    """Return the elements of a chunk on this device, the same on every rank: the order of sums depends on it. Collective.

    Counted as free is what this process has not allocated, so that the other processes of a node change nothing. Call it
    with weights and optimizer in place.
    """
    if device.type == "cpu":
        return CHUNK_LOGITS
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    mine = torch.tensor(chunk_for(accelerator.total_memory() - accelerator.memory_allocated()), device=device)
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    return int(mine)
