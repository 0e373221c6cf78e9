"""Every pair of a model family and a method: trained on two ranks as the dense reference, exported, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.methods import REGISTRY
from pretrain.model.families import FAMILIES, missing
from pretrain.trainer.plan import Plan, make_plan
from tests.methods.test_registry import assert_same_training
from tests.support.corpus import Corpus
from tests.support.dense_families import DENSE_FAMILIES
from tests.support.folded_models import folded, random_model
from tests.support.method_suite import METHODS, Case, Run, Runs, assert_same_logits, reference

PAIRS = [(family, method) for family in DENSE_FAMILIES for method in METHODS]
ACCEPTED = [(family, method) for family, method in PAIRS if not missing(family, REGISTRY[method].needs)]
# At least one pair of each family, and each thing in which families differ beside a method that acts on it.
FAST = {
    ("arcee", "wesar"),
    ("granite", "pre_ln"),
    ("mistral", "softcap"),
    ("olmo2", "lir"),
    ("olmo2", "residual_scaling"),
    ("qwen2", "weight_norm"),
    ("qwen3", "layernorm_scaling"),
}
# Plain families that are trained in the fast tests, on the ranks that are started for the pairs.
FAST_ALONE = {"granite", "olmo2"}


def slow_unless_fast(pairs: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow, id="-".join(pair)) for pair in pairs]


def alone(family: str) -> Case:
    return Case((), f"{family}-zero3", family=family, initial=True, resident=False)


def paired(family: str, method: str) -> Case:
    return Case((method,), f"{family}-zero3", family=family, initial=True)


@pytest.fixture(scope="module")
def fast_runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = [alone(family) for family in sorted(FAST_ALONE)]
    cases += [paired(*pair) for pair in sorted(FAST) if pair in ACCEPTED]
    return Runs(cases, 2, corpus, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def slow_runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """Start the slow runs of one family, when one of them is first asked for."""

    @cache
    def started(family: str) -> Runs:
        cases = [alone(family)] if family not in FAST_ALONE else []
        cases += [paired(*pair) for pair in ACCEPTED if pair[0] == family and pair not in FAST]
        return Runs(cases, 2, corpus, tmp_path_factory.mktemp(family))

    return started


# Fields of a LLaMA that change what it computes, as a user writes them.
FIELDS = {
    "rope_theta": {"rope_theta": 500.0},
    "rope_scaling": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "head_dim": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
CUT = [family for family in DENSE_FAMILIES if FAMILIES[family].whole_heads is None]


def with_fields(name: str) -> Case:
    return Case((), f"fields_{name}", initial=True, keys=tuple(FIELDS[name].items()))


def cut(family: str) -> Case:
    return Case((), f"{family}-cut", family=family, stage=1, tensor=2)


@pytest.fixture(scope="module")
def field_runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs([*map(with_fields, FIELDS)], 2, corpus, tmp_path_factory.mktemp("fields"))


@pytest.fixture(scope="module")
def cut_runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs([cut(family) for family in CUT], 2, corpus, tmp_path_factory.mktemp("cut"))


def run_of(case: Case, fast: bool, request: pytest.FixtureRequest) -> Run:
    if fast:
        return request.getfixturevalue("fast_runs").run(case.name)
    return request.getfixturevalue("slow_runs")(case.family).run(case.name)


def trained_by_transformers(run: Run, initial: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, list[float]]:
    """Return transformers' own class after the run's steps with torch's AdamW, float32, one process; and its losses."""
    settings, hf_config = run.settings(), run.plan.model_config
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config)
    model.load_state_dict(initial, strict=True)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.adam_eps)
    losses = []
    for lr, tokens in zip(settings.lrs, run.batches(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST_ALONE else pytest.mark.slow) for name in DENSE_FAMILIES]
)
def test_a_family_trains_as_transformers_own_class_and_is_exported_as_it(family, request, tmp_path):
    run = run_of(alone(family), family in FAST_ALONE, request)
    assert_as_transformers(run, run.initial, FAMILIES[family].trained_class, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_change_the_function_are_trained_and_exported(name, field_runs, tmp_path):
    run = field_runs.run(with_fields(name).name)
    assert_as_transformers(run, run.initial, "LlamaForCausalLM", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", CUT)
def test_a_family_that_tensor_parallelism_cuts_trains_as_transformers_own_class(family, cut_runs, request, tmp_path):
    whole = run_of(alone(family), family in FAST_ALONE, request)
    run = cut_runs.run(cut(family).name)
    assert_as_transformers(run, whole.initial, FAMILIES[family].trained_class, tmp_path)


@pytest.mark.parametrize("family", [family for family in DENSE_FAMILIES if family not in CUT])
def test_a_family_whose_heads_belong_together_is_not_cut(family, corpus, tmp_path):
    with pytest.raises(UserError, match=f"parallel.tensor 2 cannot cut a {family}: .* heads"):
        make_plan(Config.model_validate(cut(family).config(corpus, tmp_path)), world_size=2)


def assert_as_transformers(run: Run, initial: dict[str, torch.Tensor], exported_as: str, folder: Path) -> None:
    model, losses = trained_by_transformers(run, initial)
    assert [step["cross_entropy"] for step in run.losses] == pytest.approx(losses, rel=2e-5)
    for name, expected in model.state_dict().items():
        moved = (expected - initial[name]).norm()
        assert (run.final[name] - expected).norm() <= 2e-4 * moved + 5e-7 * expected.norm(), name
    convert(run.checkpoint, folder / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    assert type(exported).__name__ == exported_as
    assert_same_logits(exported, model, run.settings().vocabulary, bit_equal=False)


def factors_without_effect(family: str) -> list[str]:
    """Return the modules before a norm, which takes any one factor of their outputs out again."""
    before_qk_norm = ["q_proj", "k_proj"] if "self_attn.q_norm" in FAMILIES[family].in_block else []
    return before_qk_norm + (
        ["v_proj", "o_proj", "up_proj", "down_proj"] if missing(family, ["direct_branches"]) else []
    )


@pytest.mark.parametrize(("family", "method"), slow_unless_fast(ACCEPTED))
def test_a_pair_trains_as_the_dense_reference_and_converts(family, method, request, tmp_path):
    run = run_of(paired(family, method), (family, method) in FAST, request)
    free = factors_without_effect(family) if method == "sigma_reparam" else ()
    assert_same_training(run, method, run.initial, [f"{module}.weight_scale" for module in free])
    convert(run.checkpoint, tmp_path / "exported")  # which proves its logits


def planned(family: str, method: str, tied: bool, corpus: Corpus, folder: Path) -> Plan:
    content = Case((method,), "pair", family=family, tied=tied).config(corpus, folder)
    return make_plan(Config.model_validate(content), world_size=1)


@pytest.mark.parametrize("tied", [pytest.param(False, id="untied"), pytest.param(True, id="tied")])
@pytest.mark.parametrize(("family", "method"), slow_unless_fast(PAIRS))
def test_a_pair_learns_and_folds_or_is_refused_with_a_sentence(family, method, tied, corpus, tmp_path):
    if (family, method) not in ACCEPTED:
        with pytest.raises(ValidationError, match=f"method {method} cannot act on a {family}: it needs .*. Families"):
            planned(family, method, tied, corpus, tmp_path)
        return
    if tied and hasattr(reference(method), "REFUSES_TIED"):
        with pytest.raises(UserError, match=reference(method).REFUSES_TIED):
            planned(family, method, tied, corpus, tmp_path)
        return
    plan = planned(family, method, tied, corpus, tmp_path)
    model = random_model(plan)
    tokens = torch.randint(0, plan.model_config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(4))
    losses = model.train()(tokens[:, :-1], tokens[:, 1:])
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert_same_logits(folded(plan, model.eval()), model, plan.model_config.vocab_size, bit_equal=False)
