"""Values by position: any cut of a weight draws the same numbers, and they are the numbers that were asked for."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.sharded import fill as fill_module
from pretrain.sharded.fill import BLOCK, fill_normal_

GOLDEN = [-0.03721622750163078, 0.0431247316300869, -0.026082737371325493, -0.010089700110256672]


def drawn(name: str, start: int, count: int, seed: int = 0, std: float = 1.0) -> np.ndarray:
    out = torch.full((count,), torch.nan)
    fill_normal_(out, seed, name, start, std)
    return out.numpy()


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 3 * 64 + 5), max_size=6))
def test_every_cut_draws_the_same_weight(cuts):
    block, fill_module.BLOCK = fill_module.BLOCK, 64
    try:
        whole = drawn("w", 0, 3 * 64 + 5)
        edges = [0, *sorted(cuts), len(whole)]
        parts = [drawn("w", a, b - a) for a, b in pairwise(edges)]
    finally:
        fill_module.BLOCK = block
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_values_are_standard_normal():
    values = drawn("w", 0, 4 * BLOCK, std=0.02) / 0.02
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert abs(values.std() - 1) < 5 / np.sqrt(2 * len(values))
    assert abs((values**3).mean()) < 5 * np.sqrt(15 / len(values))
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / len(values))
    assert abs(np.mean(np.abs(values) < 1) - 0.682689) < 5 * np.sqrt(0.217 / len(values))


def test_blocks_names_and_seeds_are_independent():
    first = drawn("w", 0, BLOCK)
    for other in (drawn("w", BLOCK, BLOCK), drawn("v", 0, BLOCK), drawn("w", 0, BLOCK, seed=1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(BLOCK)


def test_the_values_of_a_seed_never_change():
    """Golden: resuming by seed, and every published run, depends on these numbers."""
    np.testing.assert_array_equal(
        drawn("model.layers.0.mlp.up_proj.weight", BLOCK - 2, 4, seed=7, std=0.02), np.array(GOLDEN, np.float32)
    )


def test_a_bf16_piece_holds_the_rounded_float32_draws():
    out = torch.empty(100, dtype=torch.bfloat16)
    fill_normal_(out, 0, "w", 5, 0.3)
    assert torch.equal(out, torch.from_numpy(drawn("w", 5, 100, std=0.3)).bfloat16())


def test_an_empty_piece_is_left_alone():
    assert drawn("w", 10, 0).size == 0


@pytest.mark.slow
def test_no_two_blocks_of_a_large_model_are_alike():
    starts = {tuple(drawn("w", block * BLOCK, 2).tolist()) for block in range(20_000)}
    assert len(starts) == 20_000
