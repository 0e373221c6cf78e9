"""Digests of the bits of tensors, in one pass over memory and without waiting for the device."""

from __future__ import annotations

from functools import cache

import torch

from pretrain.sharded.moments import CHUNK, chunks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over all elements i of (2 i + 1) b_i modulo 2^64, where b_i are the bits of element i as an integer.

    A single flipped bit always changes it, because a power of two below 2^64 times an odd number is no multiple of 2^64.
    So do two unequal elements that have changed places. It is no defence against an attacker.

    Args:
        tensor: of any shape and any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        An int64 scalar on the device of `tensor`.
    """
    total, first = torch.zeros((), dtype=torch.int64, device=tensor.device), 0
    for chunk in chunks(_bits(tensor)):
        odd, products = (buffer[: len(chunk)] for buffer in _buffers(chunk.device))
        # Element first + j has the multiplier (2 j + 1) + 2 first, so that one list of odd numbers serves every chunk.
        total += torch.mul(chunk, odd, out=products).sum() + 2 * first * chunk.sum()
        first += len(chunk)
    return total


def differing_elements(copy: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Count the elements of the flat `copy` that are not `original` in its precision: int64 scalar on the device of `copy`."""
    count = torch.zeros((), dtype=torch.int64, device=copy.device)
    for mine, expected in zip(chunks(copy), chunks(original.to(copy.device)), strict=True):
        count += (_bits(mine) != _bits(expected.to(mine.dtype))).sum()
    return count


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])


@cache
def _buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first odd numbers, and memory for products: fresh memory would cost more than the arithmetic."""
    odd = torch.arange(1, 2 * CHUNK[device.type], 2, device=device)
    return odd, torch.empty_like(odd)
