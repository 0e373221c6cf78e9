"""Digests of tensors: their bits in one number, in one pass over memory and without waiting for the device."""

from __future__ import annotations

from functools import cache

import torch

from pretrain.sharded.moments import CHUNK, chunks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_digest(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all elements i of (2 i + 1) b_i modulo 2^64, an int64 scalar on the device of `tensor`.

    b_i: the bits of element i as an integer. A single flipped bit always shows, because a power of two below 2^64 times
    an odd number is no multiple of 2^64; so do two unequal elements that have changed places. Not a defence against
    somebody who wants two tensors to have one digest.
    """
    total, first = torch.zeros((), dtype=torch.int64, device=tensor.device), 0
    for chunk in chunks(_bits(tensor)):
        odd, products = (buffer[: len(chunk)] for buffer in _buffers(chunk.device))
        # Element first + j has the multiplier (2 j + 1) + 2 first, so that one list of odd numbers serves every chunk.
        total += torch.mul(chunk, odd, out=products).sum() + 2 * first * chunk.sum()
        first += len(chunk)
    return total


def differing_elements(copy: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """How many elements of the flat `copy` are not `original` in its precision, an int64 scalar on the device of `copy`."""
    count = torch.zeros((), dtype=torch.int64, device=copy.device)
    for mine, expected in zip(chunks(copy), chunks(original.to(copy.device)), strict=True):
        count += (_bits(mine) != _bits(expected.to(mine.dtype))).sum()
    return count


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])


@cache
def _buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first odd numbers, and room for products: fresh memory would cost more than the arithmetic."""
    odd = torch.arange(1, 2 * CHUNK[device.type], 2, device=device)
    return odd, torch.empty_like(odd)
