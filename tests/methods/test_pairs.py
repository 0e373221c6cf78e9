"""Every pair of registered methods, generated: it trains and folds into a stock class, or is refused with a sentence."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.methods import REGISTRY, clashes_of
from pretrain.trainer.plan import Plan, make_plan
from tests.support.folded_models import folded, random_model
from tests.support.method_suite import METHODS, STEPS, Case, Runs, assert_same_logits

PAIRS = list(combinations(METHODS, 2))
FORCED = [
    tuple(sorted(clash.methods)) for clash in clashes_of([REGISTRY[name]() for name in METHODS]) if clash.scientific
]
TIED = [pytest.param(False, id="untied"), pytest.param(True, id="tied")]


def accepted(pair, tied, corpus, folder, **keys) -> Plan | None:
    """Return the plan of the pair's run, or None if it is refused with a sentence that names the cause."""
    content = Case(pair, "pair", tied=tied).config(corpus, folder) | keys
    try:
        return make_plan(Config.model_validate(content), world_size=1)
    except (ValidationError, UserError) as error:
        message = str(error)
    assert "cannot be combined" in message or (tied and "tie" in message), message
    assert any(name in message for name in pair), message
    assert len(message.split()) > 8, message
    return None


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_pair_learns_and_folds_or_is_refused(pair, tied, corpus, tmp_path):
    plan = accepted(pair, tied, corpus, tmp_path)
    if plan is not None:
        assert_learns_and_folds(plan)


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("pair", FORCED, ids="-".join)
def test_a_pair_that_is_only_advised_against_learns_and_folds_once_it_is_allowed(pair, tied, corpus, tmp_path):
    assert accepted(pair, tied, corpus, tmp_path) is None
    plan = accepted(pair, tied, corpus, tmp_path, allow=[f"{' + '.join(pair)}: to see what it does"])
    if plan is not None:
        assert_learns_and_folds(plan)


def assert_learns_and_folds(plan):
    model = random_model(plan)
    tokens = torch.randint(0, plan.model_config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(4))
    losses = model.train()(tokens[:, :-1], tokens[:, 1:])
    losses["total"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert_same_logits(folded(plan, model.eval()), model, plan.model_config.vocab_size, bit_equal=False)


@pytest.mark.slow
@pytest.mark.parametrize("first", METHODS)
def test_every_pair_trains_on_zero3_and_converts(first, corpus, tmp_path):
    """All that a user does: two ranks, four steps, a resume half way, conversion with its proof."""
    pairs = [pair for pair in PAIRS if pair[0] == first and accepted(pair, False, corpus, tmp_path)]
    runs = Runs([Case(pair, "zero3", resume_at=2) for pair in pairs], 2, corpus, tmp_path / "runs")
    for pair in pairs:
        run = runs.run(f"{'-'.join(pair)}-zero3")
        assert len(run.losses) == STEPS
        assert all(torch.equal(run.resumed[name], value) for name, value in run.final.items()), pair
        convert(run.checkpoint, tmp_path / "exported" / "-".join(pair))
