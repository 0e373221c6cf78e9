"""Digests of bits against exact integers, and the names of ranks that differ."""

from __future__ import annotations

import pytest
import torch

from pretrain.distributed.rank_names import who_differs, who_holds_what
from pretrain.resilience.digest import bit_digest, differing_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 1001, 40_000, (1 << 20) + 13])
def test_the_digest_is_the_sum_of_odd_multiples_of_the_bits(dtype: torch.dtype, length: int) -> None:
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    exact = sum((2 * i + 1) * bits for i, bits in enumerate(tensor.view(integers).tolist()))
    assert int(bit_digest(tensor)) % 2**64 == exact % 2**64


def test_every_single_bit_and_every_swap_changes_the_digest() -> None:
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0))
    digests = {int(bit_digest(tensor))}
    for element in range(50):
        for bit in range(32):
            other = tensor.clone()
            other.view(torch.int32)[element] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
            digests.add(int(bit_digest(other)))
    assert len(digests) == 50 * 32 + 1
    for first in range(50):
        for second in range(first):
            other = tensor.clone()
            other[[first, second]] = tensor[[second, first]]
            assert int(bit_digest(other)) != int(bit_digest(tensor))


def test_a_working_copy_is_compared_with_its_rounded_master() -> None:
    master = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    master[5] = float("nan")
    working = master.bfloat16()
    assert int(differing_elements(working, master)) == 0
    working[[3, 40_000]] += 1
    assert int(differing_elements(working, master)) == 2


def test_the_minority_is_named_in_ranges_with_its_hosts() -> None:
    hosts = [f"node{rank // 8}" for rank in range(32)]
    values = {rank: 2 if rank == 3 or 8 <= rank < 16 else 1 for rank in range(32)}
    assert who_holds_what(values, hosts) == "2 on ranks 3, 8-15 (node0, node1), 1 on the 23 others"
    assert who_differs(values, hosts) == "ranks 3, 8-15 (node0, node1) than on the 23 others"
    assert who_differs({4: 1, 20: 0}, hosts) == (
        "rank 4 (node0) than on rank 20 (node2), and no majority shows which is right"
    )
    assert (
        who_holds_what({0: 1, 8: 2, 16: 3}, hosts) == "1 on rank 0 (node0), 2 on rank 8 (node1), 3 on rank 16 (node2)"
    )
