"""Weight normalization: the initial gains, and its conflicts."""

from math import sqrt

import pytest
import torch

from pretrain.methods import REGISTRY, RunContext, decisions_that_clash
from pretrain.methods.weight_norm import RowGains, WeightNorm
from pretrain.model.layout import describe
from pretrain.model.reparameterization import applied

DOWN = describe("model.layers.1.mlp.down_proj.weight", (64, 160))
CONV = describe("transformer.h.1.mlp.c_proj.weight", (160, 64))
EMBED = describe("model.embed_tokens.weight", (300, 64))


def bound(**options) -> WeightNorm:
    matrices = {weight.name.removesuffix(".weight"): weight for weight in (DOWN, CONV, EMBED)}
    unused = dict.fromkeys(RunContext.__dataclass_fields__)
    facts = RunContext(**unused | {"hidden_size": 64, "layers": 8, "matrices": matrices})
    return WeightNorm(**options).bound(facts)


@pytest.mark.parametrize("matrix", [DOWN, CONV], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("backbone", "target"), [("he", sqrt(1 / (8 * 160))), ("small", sqrt(2 / (5 * 64)) / 4)])
def test_every_row_starts_with_the_backbones_deviation(matrix, backbone, target):
    method = bound(backbone=backbone)
    gains = describe(matrix.name.replace(".weight", ".weight_scale"), (64,))
    start = torch.full((64,), method.init_draw(gains).value)
    made = applied(RowGains(), torch.randn(matrix.shape), start, matrix.input_major)
    rows = made.T if matrix.input_major else made
    torch.testing.assert_close(rows.square().mean(1).sqrt(), torch.full((64,), target))


def test_stored_matrices_of_blocks_share_a_deviation_and_others_have_the_backbones():
    method = bound(variance=9e-4)
    assert method.init_std(DOWN) == method.init_std(CONV) == pytest.approx(0.03)
    assert method.init_std(EMBED) == 1.0


@pytest.mark.parametrize(
    ("other", "reason"),
    [("tvr", "would do nothing"), ("layernorm_scaling", "for the sake of depth"), ("he_init", "both decide")],
)
def test_contradictions_are_refused(other, reason):
    (clash,) = decisions_that_clash((REGISTRY[other](), WeightNorm()))
    assert reason in clash
