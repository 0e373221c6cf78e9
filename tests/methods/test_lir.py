"""LIR: the standard deviation of every weight against the paper's formula."""

from math import sqrt

import pytest

from pretrain.methods.lir import LIR
from pretrain.model.layout import describe

Q3 = describe("model.layers.2.self_attn.q_proj.weight", (64, 64))
CONV = describe("transformer.h.3.mlp.c_proj.weight", (256, 64))
EMBED = describe("model.embed_tokens.weight", (100, 64))


def test_block_matrices_shrink_with_the_root_of_their_one_based_layer():
    assert LIR(initializer_range=0.006).init_std(Q3) == pytest.approx(0.006 / sqrt(3))
    assert LIR(initializer_range=0.006).init_std(CONV) == pytest.approx(0.006 / sqrt(4))


def test_the_posters_numbers():
    """sigma 0.006: block 2 -> 0.00424, block 10 -> 0.00190."""
    deviations = [
        LIR(initializer_range=0.006).init_std(describe(f"model.layers.{layer - 1}.mlp.up_proj.weight", (8, 8)))
        for layer in (2, 10)
    ]
    assert [round(std, 5) for std in deviations] == [0.00424, 0.0019]


def test_matrices_outside_the_blocks_keep_sigma():
    assert LIR(initializer_range=0.006).init_std(EMBED) == 0.006


def test_scale_factor_divides_the_variance():
    assert LIR(initializer_range=0.02, scale_factor=4.0).init_std(Q3) == pytest.approx(0.02 / sqrt(12))
