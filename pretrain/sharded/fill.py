"""Initial values by position: element i of a weight is a pure function of (seed, weight name, i).

The flattened full weight is cut in blocks of 65,536 elements. Each block is the start of its own Philox stream
(Salmon et al. 2011), keyed by (seed, name) with the block number in the counter, so any rank draws exactly its piece
and no rank ever holds a full tensor. Values are drawn on the CPU whatever the device, so they are the same bits
everywhere. (torch's CPU generator keeps only 32 bits of its seed: with one seed per block, a 7B model would hold two
identical blocks more often than not.)
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

BLOCK = 1 << 16


def fill_normal_(out: torch.Tensor, seed: int, name: str, start: int, std: float) -> None:
    """Write elements [start, start + out.numel()) of weight `name` into `out`: normal, mean 0, deviation `std`.

    out: (elements,) contiguous float tensor on any device. Draws are float32 and are cast to the dtype of `out`.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    stop = start + out.numel()
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = max(start, block * BLOCK)
        last = min(stop, (block + 1) * BLOCK)
        values = _block(key, block, last - block * BLOCK)[first - block * BLOCK :]
        out[first - start : last - start].copy_(torch.from_numpy(values * np.float32(std)))


def _block(key: int, block: int, count: int) -> np.ndarray:
    """The first `count` standard normal float32 values of one block."""
    words = np.array([0, 0, block, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=words)).standard_normal(count, dtype=np.float32)
