"""ZClip's running statistics and thresholds, against the paper's algorithm 1 written out in float64."""

from __future__ import annotations

import json
import random
from math import sqrt
from pathlib import Path

import pytest

from pretrain.config.optim_section import OptimSection, ZClipSection
from pretrain.optim.zclip import ZClip
from tests.support.runs import arguments, events, rows, run_ranks

CONFIGS = {
    "published": ZClipSection(),
    "eager": ZClipSection(z_threshold=1.5, alpha=0.8, warmup_steps=4),
}
NORMS = [
    (50.0 if step in (37, 61, 62, 90) else 1.0) * random.Random(step).lognormvariate(0, 0.2) for step in range(120)
]


def published(norms: list[float], config: ZClipSection) -> list[float]:
    """Clip these norms by algorithm 1 of arXiv 2504.02507 (eq. 2 to 5, z* from the reciprocal form)."""
    clipped, warmup = norms[: config.warmup_steps], norms[: config.warmup_steps]
    mean = sum(warmup) / len(warmup)
    variance = sum((norm - mean) ** 2 for norm in warmup) / len(warmup)
    for norm in norms[config.warmup_steps :]:
        z = (norm - mean) / (sqrt(variance) + 1e-6)
        if z > config.z_threshold:
            norm = mean + config.z_threshold * sqrt(variance) * (config.z_threshold / z)
        mean = config.alpha * mean + (1 - config.alpha) * norm
        variance = config.alpha * variance + (1 - config.alpha) * (norm - mean) ** 2
        clipped.append(norm)
    return clipped


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_clipped_as_published(name: str) -> None:
    zclip = ZClip(CONFIGS[name])
    found = [zclip.clip(norm) for norm in NORMS]
    assert found == pytest.approx(published(NORMS, CONFIGS[name]), rel=1e-12)
    for spike in (37, 61, 62, 90):
        assert found[spike] < 2.5
    assert sum(after == before for after, before in zip(found, NORMS, strict=True)) > 60, "most are left as they are"


def test_nothing_is_clipped_during_warmup() -> None:
    zclip = ZClip(CONFIGS["eager"])
    assert [zclip.clip(norm) for norm in (1.0, 1.1, 900.0, 0.9)] == [1.0, 1.1, 900.0, 0.9]


def test_a_zclip_that_is_resumed_anywhere_clips_to_the_same_bits() -> None:
    whole = ZClip(CONFIGS["published"])
    clipped = [whole.clip(norm) for norm in NORMS]
    for stop in (0, 1, 24, 25, 26, 37, 38, 100):
        killed, resumed = ZClip(CONFIGS["published"]), ZClip(CONFIGS["published"])
        for norm in NORMS[:stop]:
            killed.clip(norm)
        resumed.load_state(json.loads(json.dumps(killed.state())))
        assert [resumed.clip(norm) for norm in NORMS[stop:]] == clipped[stop:]


def test_each_step_that_is_clipped_is_an_event_with_its_samples(run_file: Path, tmp_path: Path) -> None:
    eager = {
        "optim.zclip": {"z_threshold": 0.5, "alpha": 0.8, "warmup_steps": 3},
        "optim.grad_clip": None,
        "optim.lr": 0.3,
    }
    settings = {"out": str(tmp_path), "name": "run", "steps": 10, "data.val": None, **eager}
    assert run_ranks(arguments(run_file, settings), tmp_path / "logs").code == 0
    steps = {row["step"]: row for row in rows(tmp_path / "run", "train")}
    clipped = {event["step"]: event for event in events(tmp_path / "run", "zclip")}
    assert clipped.keys() == {step for step, row in steps.items() if row["zclip"] < 1}
    assert 0 < len(clipped) < 10
    for step, event in clipped.items():
        row = steps[step]
        said = (event["factor"], event["grad_norm"], event["first_sample"], event["last_sample"])
        assert said == (row["zclip"], row["grad_norm"], row["first_sample"], row["last_sample"])


def test_muon_and_zclip_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"with 'name: muon' zclip must be null: .*update"):
        OptimSection(name="muon", lr=1e-3, grad_clip=None, zclip=ZClipSection())
