"""The method that docs/sharded_weights.md contains does what the page says, also in a run that lists it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.methods import Method
from pretrain.model.layout import describe
from pretrain.sharded import Moments
from pretrain.trainer.plan import make_plan
from tests.support.method_suite import Case

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "sharded_weights.md"


class DenseHead:
    """A stand-in for ShardedWeights: an embedding and a head, dense."""

    def __init__(self) -> None:
        self.layout = {name: describe(name, (4, 3)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        generator = np.random.default_rng(0)
        self.arrays = {name: generator.standard_normal((4, 3)) for name in self.layout}

    def moments(self, names):
        arrays = {name: self.arrays[name] for name in names}
        return {name: Moments(a.size, a.mean(), a.var() * a.size) for name, a in arrays.items()}

    def rescale_(self, changes):
        for name, (scale, shift) in changes.items():
            self.arrays[name] = self.arrays[name] * scale + shift


def class_of_page(page: Path, name: str) -> type[Method]:
    code = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    module = {"__name__": name}
    exec(code, module)
    return module[name]


@pytest.fixture(scope="module")
def head_anchor() -> type[Method]:
    return class_of_page(PAGE, "HeadAnchor")


def test_the_method_of_the_documentation_works(head_anchor):
    weights, method = DenseHead(), head_anchor(std=0.5)
    before = weights.arrays["model.embed_tokens.weight"].copy()
    method.check(list(weights.layout.values()))
    with pytest.raises(UserError, match="finds no head"):
        method.check([weights.layout["model.embed_tokens.weight"]])
    assert method.after_step(9, weights) == {}
    assert list(method.after_step(10, weights)) == ["lm_head.weight"]
    assert weights.arrays["lm_head.weight"].std(ddof=1) == pytest.approx(0.5)
    np.testing.assert_array_equal(weights.arrays["model.embed_tokens.weight"], before)


def test_a_run_may_list_the_method_of_the_documentation(head_anchor, corpus, tmp_path):
    config = Config.model_validate(Case((), "anchored").config(corpus, tmp_path))
    plan = make_plan(config.model_copy(update={"methods": (head_anchor(std=0.5),)}), world_size=1)
    (method,) = plan.config.methods
    rules = {weight.name: method.training_rule(weight) for weight in plan.weights}
    assert rules.pop("lm_head.weight") == "head_anchor: std 0.5 every 10 steps"
    assert set(rules.values()) == {None}


def test_a_method_without_a_rule_for_any_weight_is_refused_at_start(head_anchor, corpus, tmp_path):
    class Silent(head_anchor):
        training_rule = Method.training_rule

    config = Config.model_validate(Case((), "silent").config(corpus, tmp_path))
    with pytest.raises(UserError, match="head_anchor matches no weight"):
        make_plan(config.model_copy(update={"methods": (Silent(),)}), world_size=1)


def test_the_term_of_the_documentation_is_that_of_the_last_block(corpus, tmp_path):
    method = class_of_page(DOCS / "methods/activations.md", "LastBlockPenalty")(coefficient=0.5)
    config = Config.model_validate(Case((), "penalized").config(corpus, tmp_path))
    plan = make_plan(config.model_copy(update={"methods": (method,)}), world_size=1)
    (bound,) = plan.config.methods
    (term,) = bound.hidden_terms().values()
    states = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    assert term.of_hidden(3, states).tolist() == [2.5, 1.0]
    assert term.of_hidden(2, states).tolist() == [0.0, 0.0]
