"""TVR's decisions: which weights, when, and by how much. Its arithmetic on real shards is tested in tests/sharded."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from pydantic import ValidationError

from pretrain.config.optim_section import OptimSection
from pretrain.errors import UserError
from pretrain.methods import RunContext
from pretrain.methods.tvr import TVR
from pretrain.model.layout import describe
from pretrain.optim.schedule import learning_rate
from pretrain.sharded.moments import Moments

# The schedule of the paper's 1B run.
PAPER = {"lr": 6e-4, "schedule": {"name": "cosine", "warmup_steps": 121, "min_lr_ratio": 0.1}}

SHAPES = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.3.mlp.up_proj.weight": (24, 8),
    "model.layers.3.input_layernorm.weight": (8,),
    "lm_head.weight": (50, 8),
    "model.layers.0.mlp.up_proj.weight_scale": (1,),
}
LAYOUT = {name: describe(name, shape) for name, shape in SHAPES.items()}
Q, UP1, UP4 = (name for name, weight in LAYOUT.items() if weight.in_block_matrix)


class DenseWeights:
    """A stand-in for ShardedWeights: dense float64 arrays by name."""

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
    return {
        name: 0.02 * (w - w.mean()) / w.std(ddof=1) + 0.003 if w.size > 1 else np.array([-0.5])
        for name, w in weights.items()
    }


def facts_of_run(std: float = 0.006, weight_decay: float = 0.1, **optim) -> RunContext:
    """Return the paper's run, with other values where they are given."""
    optim = OptimSection(**PAPER | optim)
    return RunContext(
        model_config=None,
        family="llama",
        hidden_size=8,
        layers=4,
        tied=False,
        matrices={},
        tokens_per_step=8_257_536,
        total_steps=12_100,
        optimizer=optim.name,
        learning_rate=partial(learning_rate, optim, total_steps=12_100),
        peak_lr=lambda weight: optim.lr,
        initial_std=lambda weight: std,
        forward_factor=lambda weight: 1.0,
        weight_decay=lambda weight: weight_decay,
    )


def in_a_run(**options) -> TVR:
    """Return TVR as part of a run in which forward multiplies by the stored matrices."""
    return TVR(**options).bound(facts_of_run())


def stds(arrays):
    return {name: arrays[name].std(ddof=1) for name in (Q, UP1, UP4)}


def test_a_matrix_above_the_threshold_gets_the_target_and_keeps_its_mean(arrays):
    facts = in_a_run(target_std=0.01, interval_steps=5).after_step(10, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.01, UP1: 0.01, UP4: 0.01})
    assert arrays[UP1].mean() == pytest.approx(0.003)
    assert facts[UP1] == {
        "std": pytest.approx(0.02),
        "mean": pytest.approx(0.003),
        "target": 0.01,
        "threshold": pytest.approx(0.012),
        "rescaled": True,
    }


def test_nothing_outside_the_block_matrices_is_touched(arrays):
    before = {name: value.copy() for name, value in arrays.items()}
    in_a_run(target_std=0.01, interval_steps=1).after_step(1, DenseWeights(arrays))
    for name in set(SHAPES) - {Q, UP1, UP4}:
        np.testing.assert_array_equal(arrays[name], before[name])


@pytest.mark.parametrize(("std", "rescaled"), [(0.005, False), (0.0119, False), (0.01200, False), (0.0121, True)])
def test_only_a_ratio_strictly_above_the_threshold_shrinks(arrays, std, rescaled):
    arrays[Q] *= std / 0.02
    facts = in_a_run(target_std=0.01, ratio_threshold=1.2 + 1e-9, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert facts[Q]["rescaled"] is rescaled
    assert stds(arrays)[Q] == pytest.approx(0.01 if rescaled else std)


def test_two_sided_raises_a_small_deviation_too(arrays):
    arrays[Q] *= 0.1
    assert in_a_run(target_std=0.01, two_sided=True, interval_steps=1).after_step(1, DenseWeights(arrays))[Q][
        "rescaled"
    ]
    assert stds(arrays)[Q] == pytest.approx(0.01)


def test_it_acts_on_multiples_of_the_global_step_only(arrays):
    method = in_a_run(target_std=0.01, interval_steps=4)
    assert [step for step in range(1, 13) if method.after_step(step, DenseWeights(dict(arrays)))] == [4, 8, 12]


def test_the_target_can_fall_with_depth(arrays):
    in_a_run(target_std=0.01, scale_with_depth=True, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.01, UP1: 0.01, UP4: 0.005})


def test_roles_and_excluded_names_limit_it(arrays):
    in_a_run(target_std=0.01, roles=("up",), exclude=(UP1,), interval_steps=1).after_step(1, DenseWeights(arrays))
    assert stds(arrays) == pytest.approx({Q: 0.02, UP1: 0.02, UP4: 0.01})


def test_biases_are_kept_unless_asked(arrays):
    bias = "model.layers.0.self_attn.q_proj.bias"
    in_a_run(target_std=0.01, interval_steps=1).after_step(1, DenseWeights(arrays))
    assert np.any(arrays[bias])
    arrays[Q] *= 2
    in_a_run(target_std=0.01, interval_steps=1, zero_bias=True).after_step(2, DenseWeights(arrays))
    assert not np.any(arrays[bias])


def test_a_weight_that_is_not_finite_is_named(arrays):
    arrays[UP4][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp\.up_proj"):
        in_a_run(interval_steps=1).after_step(1, DenseWeights(arrays))


def test_a_constant_weight_is_left_alone(arrays):
    arrays[Q][:] = 0.5
    assert not in_a_run(interval_steps=1, two_sided=True).after_step(1, DenseWeights(arrays))[Q]["rescaled"]


def test_matching_nothing_and_unknown_names_are_errors():
    weights = list(LAYOUT.values())
    with pytest.raises(UserError, match="matches no weight"):
        in_a_run(roles=("qkv",)).check(weights)
    with pytest.raises(UserError, match=r"layers\.9"):
        in_a_run(exclude=("model.layers.9.mlp.up_proj.weight",)).check(weights)


@pytest.mark.parametrize(
    ("std", "weight_decay", "simulated"),
    [
        (0.006, 0.1, 0.0332),
        (0.02, 0.1, 0.0359),
        (0.03, 0.1, 0.0391),
        (0.006, 0.0, 0.0416),
        (0.02, 0.0, 0.0460),
        (0.03, 0.0, 0.0515),
    ],
)
def test_the_predicted_deviation_is_that_of_a_simulation(std, weight_decay, simulated):
    """AdamW (0.9, 0.95) on gradients of pure noise, 12,100 steps of the paper's schedule."""
    method = TVR(relative_target=0.3).bound(facts_of_run(std, weight_decay))
    assert method.free_running(LAYOUT[Q]) == pytest.approx(simulated, rel=0.02)


def test_a_relative_target_is_a_share_of_the_prediction():
    method = TVR(relative_target=0.3, scale_with_depth=True).bound(facts_of_run())
    predicted = method.free_running(LAYOUT[UP4])
    assert method.target(LAYOUT[UP1], step=1) == pytest.approx(0.3 * predicted)
    assert method.target(LAYOUT[UP4], step=1) == pytest.approx(0.3 * predicted / 2)


def test_the_target_warms_up_from_the_initial_deviation():
    method = TVR(target_std=0.01, target_warmup_steps=100).bound(facts_of_run(std=0.006))
    found = [method.target(LAYOUT[Q], step) for step in (1, 50, 99, 100, 5000)]
    assert found == pytest.approx([0.00604, 0.008, 0.00996, 0.01, 0.01])


@pytest.mark.parametrize(("tokens", "steps"), [(1e9, 121), (1e6, 1), (12.6e6, 2)])
def test_an_interval_in_tokens_is_rounded_to_steps(tokens, steps):
    method = TVR(interval_tokens=tokens).bound(facts_of_run())
    assert method.interval == steps
    assert f"every {steps} steps" in method.training_rule(LAYOUT[Q])


@pytest.mark.parametrize("factor", [-0.5, "model.layers.0.mlp.up_proj.weight_scale"])
@pytest.mark.parametrize("target", [{"target_std": 0.005}, {"relative_target": 0.3}])
def test_it_holds_what_forward_multiplies_by(arrays, factor, target):
    """The factor, a number or trained, is -0.5. A relative target does not depend on it."""
    run = replace(facts_of_run(), forward_factor=lambda weight: factor if weight.name == UP1 else 1.0)
    method = TVR(**target, roles=("up",), interval_steps=1).bound(run)
    facts = method.after_step(1, DenseWeights(arrays))
    expected = 0.01 if "target_std" in target else 0.3 * method.free_running(LAYOUT[UP1])
    assert facts[UP1]["target"] == pytest.approx(expected)
    assert stds(arrays)[UP1] == pytest.approx(expected)
    assert arrays[UP1].mean() == pytest.approx(0.003)


def test_a_matrix_that_forward_multiplies_by_zero_is_left_alone(arrays):
    run = replace(facts_of_run(), forward_factor=lambda weight: 0.0)
    facts = TVR(interval_steps=1, two_sided=True).bound(run).after_step(1, DenseWeights(arrays))
    assert not any(seen["rescaled"] for seen in facts.values())


def test_alternatives_exclude_each_other_and_survive_being_written_down():
    for both in ({"target_std": 0.01, "relative_target": 0.3}, {"interval_steps": 50, "interval_tokens": 1e9}):
        with pytest.raises(ValidationError, match="not both"):
            TVR(**both)
    with pytest.raises(ValidationError, match="target_std null needs relative_target"):
        TVR(target_std=None)
    method = TVR(relative_target=0.3, interval_tokens=1e9)
    assert (method.target_std, method.interval_steps) == (None, None)
    assert TVR.model_validate(method.model_dump(mode="json")) == method
    assert TVR.model_validate(TVR().model_dump(mode="json")) == TVR()


def test_a_relative_target_is_refused_with_muon():
    method = TVR(relative_target=0.3).bound(facts_of_run(name="muon", grad_clip=None))
    with pytest.raises(UserError, match="Give target_std"):
        method.check(list(LAYOUT.values()))


@pytest.mark.parametrize(
    ("options", "factor", "rule"),
    [
        ({"target_std": 0.01}, 1.0, "tvr: std above 1.2x -> 0.01, every 50 steps"),
        ({"target_std": 0.01}, 0.25, "tvr: std of αW above 1.2x -> 0.01, every 50 steps"),
        ({"target_std": 0.01}, "model.x.weight_scale", "tvr: std of αW above 1.2x -> 0.01, every 50 steps"),
        ({"relative_target": 0.3}, 0.25, "tvr: std above 1.2x -> 0.3 x 0.034, every 50 steps"),
        ({"two_sided": True}, 1.0, "tvr: std above 1.2x or below 1/1.2x -> 0.01, every 50 steps"),
    ],
)
def test_the_rule_says_whose_deviation_is_held(options, factor, rule):
    run = replace(facts_of_run(), forward_factor=lambda weight: factor)
    assert TVR(**options).bound(run).training_rule(LAYOUT[Q]) == rule


def test_the_nearest_name_is_in_the_error():
    with pytest.raises(UserError, match=rf"nearest names are: {UP4}\.$"):
        in_a_run(exclude=(UP4.removesuffix(".weight"), "zzz")).check(list(LAYOUT.values()))


def test_no_role_at_all_is_refused():
    with pytest.raises(ValidationError, match="nothing to hold"):
        TVR(roles=())
