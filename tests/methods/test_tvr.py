"""TVR's decisions: which weights, when, and by how much. What it does to real shards is in tests/distributed."""

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.layout import describe
from pretrain.methods.tvr import TVR
from pretrain.sharded.moments import Moments

SHAPES = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.3.mlp.up_proj.weight": (24, 8),
    "model.layers.3.input_layernorm.weight": (8,),
    "lm_head.weight": (50, 8),
}
LAYOUT = {name: describe(name, shape) for name, shape in SHAPES.items()}
Q, UP1, UP4 = (name for name, weight in LAYOUT.items() if weight.in_block_matrix)


class DenseWeights:
    """Stands in for ShardedWeights: dense float64 arrays by name."""

    layout = LAYOUT

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def moments(self, names):
        return {
            n: Moments(self.arrays[n].size, self.arrays[n].mean(), self.arrays[n].var() * self.arrays[n].size)
            for n in names
        }

    def rescale_(self, changes):
        for name, (scale, shift) in changes.items():
            self.arrays[name] = scale * self.arrays[name] + shift


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: 0.02 * (w - w.mean()) / w.std(ddof=1) + 0.003 for name, w in weights.items()}


def stds(arrays):
    return {name: arrays[name].std(ddof=1) for name in (Q, UP1, UP4)}


def test_a_matrix_above_the_threshold_gets_the_target_and_keeps_its_mean(arrays):
    facts = TVR(target_std=0.01, interval_steps=5).after_step(10, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.01, UP1: 0.01, UP4: 0.01})
    assert arrays[UP1].mean() == pytest.approx(0.003)
    assert facts[UP1] == {"std": pytest.approx(0.02), "mean": pytest.approx(0.003), "rescaled": True}


def test_nothing_outside_the_block_matrices_is_touched(arrays):
    before = {name: value.copy() for name, value in arrays.items()}
    TVR(target_std=0.01, interval_steps=1).after_step(1, DenseWeights(arrays))
    for name in set(SHAPES) - {Q, UP1, UP4}:
        np.testing.assert_array_equal(arrays[name], before[name])


@pytest.mark.parametrize(("std", "rescaled"), [(0.005, False), (0.0119, False), (0.01200, False), (0.0121, True)])
def test_only_a_ratio_strictly_above_the_threshold_shrinks(arrays, std, rescaled):
    arrays[Q] *= std / 0.02
    facts = TVR(target_std=0.01, ratio_threshold=1.2 + 1e-9, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert facts[Q]["rescaled"] is rescaled
    assert stds(arrays)[Q] == pytest.approx(0.01 if rescaled else std)


def test_two_sided_raises_a_small_deviation_too(arrays):
    arrays[Q] *= 0.1
    assert TVR(target_std=0.01, two_sided=True, interval_steps=1).after_step(1, DenseWeights(arrays))[Q]["rescaled"]
    assert stds(arrays)[Q] == pytest.approx(0.01)


def test_it_acts_on_multiples_of_the_global_step_only(arrays):
    method = TVR(target_std=0.01, interval_steps=4)
    assert [step for step in range(1, 13) if method.after_step(step, DenseWeights(dict(arrays)))] == [4, 8, 12]


def test_the_target_can_fall_with_depth(arrays):
    TVR(target_std=0.01, scale_with_depth=True, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.01, UP1: 0.01, UP4: 0.005})


def test_roles_and_excluded_names_limit_it(arrays):
    TVR(target_std=0.01, roles=("up",), exclude=(UP1,), interval_steps=1).after_step(1, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.02, UP1: 0.02, UP4: 0.01})


def test_biases_are_kept_unless_asked(arrays):
    bias = "model.layers.0.self_attn.q_proj.bias"
    TVR(target_std=0.01, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert np.any(arrays[bias])
    arrays[Q] *= 2
    TVR(target_std=0.01, interval_steps=1, zero_bias=True).after_step(2, DenseWeights(arrays))
    assert not np.any(arrays[bias])


def test_a_weight_that_is_not_finite_is_named(arrays):
    arrays[UP4][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp\.up_proj"):
        TVR(interval_steps=1).after_step(1, DenseWeights(arrays))


def test_a_constant_weight_is_left_alone(arrays):
    arrays[Q][:] = 0.5
    assert not TVR(interval_steps=1, two_sided=True).after_step(1, DenseWeights(arrays))[Q]["rescaled"]


def test_matching_nothing_and_unknown_names_are_errors():
    weights = list(LAYOUT.values())
    with pytest.raises(UserError, match="matches no weight"):
        TVR(roles=("qkv",)).check(weights)
    with pytest.raises(UserError, match=r"layers\.9"):
        TVR(exclude=("model.layers.9.mlp.up_proj.weight",)).check(weights)
