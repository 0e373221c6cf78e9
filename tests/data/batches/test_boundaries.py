"""Positions and counted targets against a loop over the tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.batches.boundaries import restart


def by_loop(lengths: list[int], start: int, seq_len: int) -> tuple[list[int], list[bool]]:
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    positions, counted = [], []
    for place in range(seq_len):
        new = place == 0 or document[start + place] != document[start + place - 1]
        positions.append(0 if new else positions[-1] + 1)
        counted.append(document[start + place] == document[start + place + 1])
    return positions, counted


@given(st.data(), st.sampled_from([np.int64, np.uint64]))
def test_every_token_knows_its_place_in_its_document(data, dtype):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=40))
    seq_len = data.draw(st.integers(1, sum(lengths) - 1))
    starts = data.draw(st.lists(st.integers(0, sum(lengths) - 1 - seq_len), max_size=5))
    positions, counted = restart(np.cumsum(lengths).astype(dtype), np.array(starts, dtype=np.int64), seq_len)
    assert positions.dtype == np.int64
    assert positions.shape == counted.shape == (len(starts), seq_len)
    for row, start in enumerate(starts):
        assert (positions[row].tolist(), counted[row].tolist()) == by_loop(lengths, start, seq_len)


@pytest.mark.parametrize("far", [2**33, 2**53])
def test_tokens_far_into_a_shard_are_told_apart(far):
    """numpy compares uint64 with int64 as float64, where 2^53 + 1 would be 2^53."""
    ends = np.array([far, far + 3, far + 10], dtype=np.uint64)
    positions, counted = restart(ends, np.array([far - 1, far, far + 1]), 5)
    assert positions.tolist() == [[0, 0, 1, 2, 0], [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert counted.tolist() == [
        [False, True, True, False, True],
        [True, True, False, True, True],
        [True, False, True, True, True],
    ]
