"""Every registered method's trained model against the exported one: a stock class, the same logits, the same text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoints.method_state import read_method_state
from pretrain.export.convert import convert
from pretrain.methods import REGISTRY
from pretrain.model.families import missing
from tests.support.method_suite import METHODS, Run, assert_same_logits, generated, parameters, reference, trainer_model


class Pair:
    """Return the model that was trained in a run, and the exported one."""

    def __init__(self, run: Run, folder) -> None:
        convert(run.checkpoint, folder)
        self.folder, self.vocabulary = folder, run.plan.model_config.vocab_size
        self.trained = trainer_model(run.plan, run.final, read_method_state(run.checkpoint))
        self.exported = load(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


@pytest.fixture(scope="session")
def pair_of(on_two, tmp_path_factory):
    made = {}

    def of(case: str) -> Pair:
        if case not in made:
            made[case] = Pair(on_two.run(case), tmp_path_factory.mktemp("exported") / case)
        return made[case]

    return of


def variants(*labels: str):
    """Return (method, label) for the variants that a method can have."""
    found = []
    for method in METHODS:
        formulas = reference(method)
        for label in labels:
            if label == "zero3_tied" and hasattr(formulas, "REFUSES_TIED"):
                continue
            if label == "zero2_gpt2" and (missing("gpt2", REGISTRY[method].needs) or hasattr(formulas, "REFUSES_TIED")):
                continue
            found.append((method, label))
    return pytest.mark.parametrize(("method", "label"), parameters(found))


def is_bit_equal(method: str, label: str) -> bool:
    formulas = reference(method)
    tied = getattr(formulas, "FOLD_TIED", formulas.FOLD)
    grades = {"zero3_tied": tied, "zero2_gpt2": getattr(formulas, "FOLD_GPT2", tied)}
    return grades.get(label, formulas.FOLD) == "bit"


@variants("zero3", "zero3_tied", "zero2_gpt2")
def test_logits_are_the_trainers(pair_of, method, label):
    pair = pair_of(f"{method}-{label}")
    assert_same_logits(pair.exported, pair.trained, pair.vocabulary, is_bit_equal(method, label))


@variants("zero3_bf16")
def test_in_bf16_logits_are_the_trainers_to_the_bit_or_to_its_rounding(pair_of, method, label):
    pair = pair_of(f"{method}-{label}")
    assert next(pair.exported.parameters()).dtype == torch.bfloat16
    if is_bit_equal(method, label):
        assert_same_logits(pair.exported, pair.trained, pair.vocabulary, bit_equal=True)
        return
    ids = torch.randint(0, pair.vocabulary, (2, 64), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found, expected = (model(ids, use_cache=False).logits.double() for model in (pair.exported, pair.trained))
    assert (found - expected).norm() < 0.02 * expected.norm()  # bf16 has three digits


@variants("zero3", "zero3_tied", "zero2_gpt2")
def test_greedy_decoding_gives_the_same_64_tokens(pair_of, method, label):
    pair = pair_of(f"{method}-{label}")
    assert generated(pair.exported, pair.vocabulary) == generated(pair.trained, pair.vocabulary)


@variants("zero3", "zero3_tied")
def test_the_class_is_the_one_that_holds_it(pair_of, method, label):
    formulas = reference(method)
    expected = getattr(formulas, "EXPORTS_TIED", formulas.EXPORTS) if label.endswith("tied") else formulas.EXPORTS
    assert type(pair_of(f"{method}-{label}").exported).__name__ == expected


@variants("zero3", "zero3_tied")
def test_saving_and_loading_again_changes_nothing(pair_of, method, label, tmp_path):
    pair = pair_of(f"{method}-{label}")
    pair.exported.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), pair.exported, pair.vocabulary, bit_equal=True)


@variants("zero3")
def test_one_percent_off_in_one_folded_weight_is_noticed(pair_of, method, label):
    pair = pair_of(f"{method}-{label}")
    wrong = load(pair.folder)
    wrong.get_parameter(reference(method).CONTROL).data.mul_(1.01)
    with pytest.raises(AssertionError):
        assert_same_logits(wrong, pair.trained, pair.vocabulary, bit_equal=False)
