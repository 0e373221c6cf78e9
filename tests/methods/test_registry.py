"""Every registered method against the formula, on real ranks: a new file in pretrain/methods is covered at once.

It needs a reference file (see dense.py). Expected values come from there, never from the code under test.
`METHODS=lir,tvr pytest tests/methods` runs those of some methods only.
"""

from __future__ import annotations

import os
import re
from math import sqrt

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.methods import REGISTRY
from pretrain.trainer.plan import make_plan
from tests.support.method_suite import (
    METHODS,
    STAGES_BELOW_3,
    Case,
    acts,
    has_reference,
    parameters,
    reference,
    trained_densely,
)

# Tolerances: float32, ranks add in another order, and Adam divides small gradients by their own size.
WEIGHTS = 2e-4  # of the norm of the change
LOSSES = 2e-5


def test_every_method_has_a_reference():
    """`METHODS` below are those that have one."""
    assert [method for method in REGISTRY if not has_reference(method)] == []


def assert_same_training(run, method, initial, without_effect=()):
    """Compare losses and weights. Those with a name that ends as in `without_effect` get a gradient of rounding only."""
    dense, losses = trained_densely(run, method, initial)
    assert dense.weights.keys() == run.final.keys()
    for step, (found, expected) in enumerate(zip(run.losses, losses, strict=True), start=1):
        assert found == pytest.approx(expected, rel=LOSSES), f"losses of step {step}"
    for name, expected in dense.weights.items():
        if name.endswith(tuple(without_effect)):
            continue
        expected = expected.detach()
        moved = (expected - initial[name]).norm()
        error = (run.final[name] - expected).norm()
        assert error <= WEIGHTS * moved + 5e-7 * expected.norm(), f"{name}: off by {error:.2e}, moved by {moved:.2e}"


@pytest.mark.parametrize("method", METHODS)
def test_zero3_trains_as_the_dense_reference(on_two, method):
    run = on_two.run(f"{method}-zero3")
    assert_same_training(run, method, run.initial)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_three_ranks_train_as_the_dense_reference(on_two, on_three, method):
    assert_same_training(on_three.run(f"{method}-zero3"), method, on_two.run(f"{method}-zero3").initial)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES_BELOW_3)
@pytest.mark.parametrize("method", METHODS)
def test_other_stages_train_as_the_dense_reference(on_two, method, stage):
    assert_same_training(on_two.run(f"{method}-zero{stage}"), method, on_two.run(f"{method}-zero3").initial)


CUT = [(method, "cut") for method in METHODS if REGISTRY[method].tensor_parallel]


@pytest.mark.parametrize(("method", "label"), parameters(CUT))
def test_matrices_cut_by_tensor_parallelism_train_as_the_dense_reference(on_two, cut_in_two, method, label):
    assert_same_training(cut_in_two.run(f"{method}-{label}"), method, on_two.run(f"{method}-zero3").initial)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_share_sequences_train_as_the_dense_reference(on_two, sliced, method):
    assert_same_training(sliced.run(f"{method}-sliced"), method, on_two.run(f"{method}-zero3").initial)


TIED = [(method, "zero3_tied") for method in METHODS if not hasattr(reference(method), "REFUSES_TIED")]


@pytest.mark.parametrize(("method", "label"), parameters(TIED))
def test_a_tied_model_trains_as_the_dense_reference(on_two, method, label):
    run = on_two.run(f"{method}-{label}")
    assert_same_training(run, method, run.initial)


@pytest.mark.parametrize("method", [method for method in METHODS if hasattr(reference(method), "REFUSES_TIED")])
def test_a_tied_model_is_refused(corpus, tmp_path, method):
    content = Case((method,), "tied", tied=True).config(corpus, tmp_path)
    with pytest.raises((UserError, ValidationError), match=reference(method).REFUSES_TIED):
        make_plan(Config.model_validate(content), world_size=1)


@pytest.mark.parametrize(
    ("method", "label"),
    parameters([*((method, "zero3") for method in METHODS), *TIED]),
)
def test_every_weight_starts_as_the_formula_says(on_two, method, label):
    run, formulas = on_two.run(f"{method}-{label}"), reference(method)
    std_of, value_of = getattr(formulas, "initial_std", None), getattr(formulas, "initial_value", None)
    for name, weight in run.initial.items():
        constant = value_of(name, run.settings()) if value_of else None
        if constant is None and weight.dim() == 1:
            constant = 0.0 if name.endswith("bias") else 1.0
        if constant is not None:
            torch.testing.assert_close(weight, torch.full_like(weight, constant), rtol=1e-6, atol=0, msg=name)
            continue
        std = std_of(name, tuple(weight.shape), run.settings()) if std_of else None
        expected = run.settings().std if std is None else std
        values = weight.double().flatten()
        kurtosis = float(((values - values.mean()) ** 4).mean() / values.var() ** 2)
        error = 5 * sqrt(max(kurtosis - 1, 0.5) / (4 * values.numel()))
        assert float(values.std()) == pytest.approx(expected, rel=error), name


@pytest.mark.parametrize(
    ("method", "label"),
    parameters((method, label) for method in METHODS for label in ("zero3", "zero3_bf16") if acts(method)),
)
def test_a_resumed_run_ends_with_the_same_bits(on_two, method, label):
    run = on_two.run(f"{method}-{label}")
    assert run.resumed.keys() == run.final.keys()
    for name, expected in run.final.items():
        assert torch.equal(run.resumed[name], expected), name


@pytest.mark.parametrize("method", METHODS)
def test_the_table_before_the_start_names_every_weight_and_the_method(corpus, tmp_path, method, monkeypatch, capsys):
    """`train.py --dry-run` prints the same."""
    from pretrain.train import dry_run

    monkeypatch.setattr(os, "environ", {**os.environ, "WORLD_SIZE": "2"})  # a dry run fills in the rest
    config = Config.model_validate(Case((method,), "table").config(corpus, tmp_path))
    dry_run(config)
    printed = capsys.readouterr().out
    rows = printed[printed.index("\nweights ") :].splitlines()[3:]
    counted = sum(int(re.match(r"\S+(?: of \S+)? +\S+ +(\d+)", row)[1]) for row in rows)
    assert counted == len(make_plan(config, world_size=2).weights)
    assert f"{method}: " in printed


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_own_weights_have_a_rule_of_training(corpus, tmp_path, method):
    plain, plan = (
        make_plan(Config.model_validate(Case(methods, "own").config(corpus, tmp_path)), world_size=1)
        for methods in ((), (method,))
    )
    own = {weight.name for weight in plan.weights} - {weight.name for weight in plain.weights}
    silent = [weight.name for weight in plan.weights if not plan.config.methods[0].training_rule(weight)]
    assert not own & set(silent)
