"""The elements that a rank owns and counts: every element of a weight exactly once, whatever cuts it."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.sharded.piece import Slice, make_piece


@given(count=st.integers(0, 50), replicas=st.integers(1, 9), start=st.integers(0, 100))
def test_ranks_that_own_the_same_elements_count_each_of_them_once(count, replicas, start):
    master = torch.arange(start, start + count, dtype=torch.float32)
    pieces = [make_piece("w", Slice((200,)), start, master, replicas, replica) for replica in range(replicas)]
    assert torch.equal(torch.cat([piece.counted for piece in pieces]), master)
    for piece in pieces:
        assert piece.counted.tolist() == list(range(piece.counted_start, piece.counted_start + len(piece.counted)))
        assert len(piece.counted) <= -(-count // replicas)


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), dim=st.sampled_from([0, 1]), data=st.data())
def test_slices_tile_the_weight(rows, columns, dim, data):
    full = torch.arange(rows * columns).view(rows, columns)
    cuts = sorted(data.draw(st.lists(st.integers(0, full.shape[dim]), max_size=3)))
    edges = [0, *cuts, full.shape[dim]]
    slices = [Slice((rows, columns), dim, first, last) for first, last in pairwise(edges)]
    assert torch.equal(torch.cat([part.of(full) for part in slices], dim), full)
    assert [part.numel for part in slices] == [part.of(full).numel() for part in slices]


def test_what_is_not_cut_is_its_own_slice():
    full = torch.zeros(3, 4)
    assert Slice((3, 4)).of(full) is full
    assert Slice((3, 4)).numel == 12
