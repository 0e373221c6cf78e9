"""The fake device catches what a careless edit could bring: each fault ends a run that is otherwise sound."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fakecuda import build
from tests.fakecuda.cases import CASES, Case
from tests.fakecuda.suite import Outcome, run_cases
from tests.support.corpus import Corpus

pytestmark = [
    pytest.mark.cuda_placement,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or ""),
]

SAME_DEVICE = "to be on the same device"
NO_BACKEND = "No backend type associated with device type"

# The run that has the fault, and what its error says.
FAULTS: dict[str, tuple[Case, str]] = {
    "batch_stays_on_host": (CASES["zero1-bf16"], SAME_DEVICE),
    "digest_stays_on_host": (CASES["zero1-bf16"], f"{NO_BACKEND} cpu"),
    "flags_on_device": (CASES["zero1-bf16"], f"{NO_BACKEND} cuda"),
    "vectors_restored_on_host": (CASES["method-sigma_reparam"], SAME_DEVICE),
    "weights_are_not_filled": (CASES["zero1-bf16"], "initialization of model.embed_tokens.weight went wrong"),
}


@pytest.fixture(scope="module")
def found(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return the outcome of each fault on the fake device."""
    cases = {name: replace(case, plant=name) for name, (case, _) in FAULTS.items()}
    return run_cases(cases, 1, corpus, tmp_path_factory.mktemp("planted"), devices=("cuda",))["cuda"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_ends_the_run(fault: str, found: dict[str, Outcome]) -> None:
    _, message = FAULTS[fault]
    assert not found[fault].finished
    assert message in found[fault].output
