"""σReparam: γ may start at the spectral norm, and what the method cannot be combined with."""

from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.stored import master_weights
from pretrain.methods import REGISTRY, decisions_that_clash
from pretrain.methods.sigma_reparam import SigmaReparam
from tests.support.corpus import Corpus
from tests.support.runs import arguments, run_ranks


def test_gamma_may_start_at_the_spectral_norm(run_file: Path, corpus: Corpus, tmp_path: Path) -> None:
    """With a learning rate near zero the first checkpoint holds the initial γ."""
    run = {"out": str(tmp_path), "name": "run", "steps": 1, "data.val": None, "optim.lr": 1e-12}
    methods = [{"name": "sigma_reparam", "initial_scale": "spectral_norm"}]
    assert run_ranks(arguments(run_file, run | {"methods": methods}), tmp_path / "logs").code == 0
    stored = master_weights(tmp_path / "run/checkpoints/step_00000001/deepspeed")
    for name in [name for name in stored if name.endswith("weight_scale")]:
        norm = torch.linalg.matrix_norm(stored[name.removesuffix("_scale")](), 2)
        torch.testing.assert_close(stored[name](), norm.reshape(1), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("other", "reason"), [("tvr", "would do nothing"), ("small_init", "both decide"), ("wesar", "both decide")]
)
def test_contradictions_are_refused(other, reason):
    (clash,) = decisions_that_clash((REGISTRY[other](), SigmaReparam()))
    assert reason in clash
