"""Whole runs on the fake CUDA device: no op mixes devices, no group gets a tensor of the other kind, losses are the CPU's.

The losses are equal to the last bit. The fake device runs the CPU's kernels on the
same values, and the CPU's own run uses the kernels that the product chooses on a GPU
(`placement_worker.compute_as_the_device_does`). What differs is where tensors lie. A value read before it was written, or
one that came from elsewhere, changes a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.fakecuda import build
from tests.fakecuda.cases import CASES, RESUME_AT, Case
from tests.fakecuda.suite import Outcome, run_cases
from tests.support import runs
from tests.support.corpus import Corpus
from tests.support.selection import asked_for

pytestmark = [
    pytest.mark.cuda_placement,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or ""),
]

Outcomes = Callable[[int], dict[str, dict[str, Outcome]]]

RUNS = [
    pytest.param(ranks, name, marks=[pytest.mark.slow] * (ranks in case.slow), id=f"{name}-on-{ranks}")
    for ranks in (1, 2)
    for name, case in CASES.items()
    if ranks in case.ranks
]
FILES = [name for name in CASES if name.startswith("file-")]
ON_ONE = pytest.mark.parametrize("ranks", [1])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Return a function that gives the outcomes of all cases on so many ranks, by device. The first call runs them."""

    @cache
    def on_ranks(ranks: int) -> dict[str, dict[str, Outcome]]:
        chosen = asked_for(request, CASES, ranks=ranks)
        return run_cases(chosen, ranks, corpus, tmp_path_factory.mktemp(f"ranks{ranks}"))

    return on_ranks


@pytest.fixture(scope="module")
def crossed(
    outcomes: Outcomes, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Outcome]]:
    """Return the outcomes of runs that resume from the other device's checkpoint, by the device that they run on."""
    found: dict[str, dict[str, Outcome]] = {}
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        before = outcomes(1)[other]
        cases = {
            name: _from_checkpoint(CASES[name], before[name].folder / f"checkpoints/step_{RESUME_AT:08d}")
            for name in FILES
            if name in before  # the session may have chosen some only
        }
        folder = tmp_path_factory.mktemp(f"crossed_to_{device}")
        found |= run_cases(cases, 1, corpus, folder, devices=(device,))
    return found


def _from_checkpoint(case: Case, checkpoint: Path) -> Case:
    return Case({**case.settings, "checkpoint.resume": str(checkpoint)})


@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_a_run_on_the_device_has_the_losses_of_one_on_the_cpu(ranks: int, case: str, outcomes: Outcomes) -> None:
    device, cpu = outcomes(ranks)["cuda"][case], outcomes(ranks)["cpu"][case]
    for outcome in (cpu, device):
        assert outcome.finished, outcome.output
    assert device.figures() == cpu.figures()
    assert len(cpu.figures()) > CASES[case].steps
    if CASES[case].resumes:
        assert device.resumed.figures() == cpu.resumed.figures()
        assert cpu.resumed.figures().items() <= cpu.figures().items(), "a resumed run continues bit for bit"


@ON_ONE
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("case", FILES)
def test_a_checkpoint_of_the_other_device_is_resumed(
    ranks: int, case: str, device: str, crossed: dict[str, dict[str, Outcome]], outcomes: Outcomes
) -> None:
    outcome = crossed[device][case]
    assert outcome.finished, outcome.output
    assert outcome.figures() == outcomes(ranks)[device][case].resumed.figures()


@ON_ONE
@pytest.mark.parametrize("case", ["rollback"])
def test_a_run_that_goes_back_writes_its_autopsy(ranks: int, case: str, outcomes: Outcomes) -> None:
    folders = [found[case].folder for found in outcomes(ranks).values()]
    for folder in folders:
        assert len(runs.events(folder, "rolled_back")) == 1
        assert list((folder / "autopsies").iterdir())
