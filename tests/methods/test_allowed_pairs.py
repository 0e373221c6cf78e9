"""Pairs that are only advised against: which they are, how a run takes one, and what an entry of `allow` must say."""

from __future__ import annotations

import pytest

from pretrain.config.schema import Config
from pretrain.methods import REGISTRY, clashes_of
from pretrain.trainer.plan import make_plan
from pretrain.trainer.plan_summary import describe_plan
from tests.methods.test_initial_deviations import config
from tests.support.method_suite import Case

DAMPED_FOR_DEPTH = ("residual_init", "small_init", "he_init", "depth_scaled_init")
# Well defined, and against what is known. Every other pair that is refused has no meaning.
ADVISED_AGAINST = {
    *((name, "layernorm_scaling") for name in (*DAMPED_FOR_DEPTH, "residual_scaling", "wesar", "weight_norm")),
    *((name, "residual_scaling") for name in (*DAMPED_FOR_DEPTH, "lir")),
    ("softcap", "mu_centering"),
}
PAIR = [{"name": "layernorm_scaling"}, {"name": "residual_init"}]


def test_every_pair_that_is_refused_is_refused_for_one_of_the_two_kinds_of_reasons():
    clashes = clashes_of([cls() for cls in REGISTRY.values()])
    assert {clash.methods for clash in clashes if clash.scientific} == set(map(frozenset, ADVISED_AGAINST))
    for clash in clashes:
        assert len(clash.reason.split()) > 5, clash
    no_meaning = {clash.methods for clash in clashes if not clash.scientific}
    assert {
        frozenset(pair) for pair in (("tvr", "weight_norm"), ("lir", "he_init"), ("softcap", "qk_norm"))
    } < no_meaning


def test_no_pair_has_reasons_of_both_kinds():
    for name, cls in REGISTRY.items():
        assert not cls.conflicts.keys() & cls.discouraged.keys()
        for other in cls.discouraged:
            assert name not in REGISTRY[other].conflicts


def test_the_refusal_says_how_to_take_the_pair():
    with pytest.raises(ValueError, match=r'allow: \["layernorm_scaling \+ residual_init: the reason"\]'):
        config(*PAIR)
    with pytest.raises(ValueError) as caught:
        config({"name": "tvr"}, {"name": "weight_norm"})
    assert "allow" not in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "entry", "expected"),
    [
        (PAIR, "layernorm_scaling + residual_init", "does not name a pair and a reason"),
        (PAIR, "layernorm_scaling + residual_init: ", "does not name a pair and a reason"),
        (PAIR, "layernorm_scaling: table 3", "does not name a pair and a reason"),
        (PAIR, "layernorm_scaling + layernorm_scaling: table 3", "does not name a pair and a reason"),
        ([{"name": "lir"}], "layernorm_scaling + lir: table 3", "does not list layernorm_scaling"),
        ([{"name": "lir"}, {"name": "tvr"}], "tvr + lir: both are good", "is refused nowhere"),
    ],
)
def test_an_entry_that_says_nothing_is_refused(methods, entry, expected):
    with pytest.raises(ValueError, match=expected):
        config(*methods, allow=[entry])


def test_a_pair_that_has_no_meaning_cannot_be_allowed():
    with pytest.raises(ValueError, match="weight_norm divides it by its own norms"):
        config({"name": "tvr"}, {"name": "weight_norm"}, allow=["tvr + weight_norm: to see"])


def test_one_entry_for_a_pair():
    twice = ["layernorm_scaling + residual_init: table 3", "residual_init + layernorm_scaling: table 4"]
    with pytest.raises(ValueError, match="listed twice"):
        config(*PAIR, allow=twice)


def test_the_plan_says_what_is_trained_against_advice_and_why(corpus, tmp_path):
    content = Case(("layernorm_scaling", "residual_init"), "allowed").config(corpus, tmp_path)
    allowed = Config.model_validate({**content, "allow": ["residual_init + layernorm_scaling:  reproducing  table 3"]})
    plan = make_plan(allowed, world_size=2)
    (line,) = [line for line in describe_plan(plan).splitlines() if line.startswith("allowed")]
    assert "layernorm_scaling + residual_init, against advice" in line
    assert line.endswith("because: reproducing table 3")
    assert "reproducing  table 3" in plan.config.to_yaml()
