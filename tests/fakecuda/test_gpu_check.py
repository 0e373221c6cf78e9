"""Every stage of tools/gpu_check.py runs, and finds nothing wrong, on the fake device: no minute on a GPU is lost to a typo."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from pretrain.gpu_check.runner import RESULTS, steps
from pretrain.gpu_check.speed import CASES
from tests.fakecuda import build

pytestmark = [pytest.mark.cuda_placement, pytest.mark.timeout(1800)]
ON_THE_DEVICE = [sys.executable, "-m", "tests.fakecuda.run"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Return the ended command and its findings."""
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("gpu_check") / "out"
    words = ["--quick", "--minutes", "29", "--out", str(out), "--python", shlex.join(ON_THE_DEVICE)]
    environment = os.environ | {"LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [*ON_THE_DEVICE, "tools/gpu_check.py", *words]
    ended = subprocess.run(command, cwd=build.REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    lines = (out / RESULTS).read_text(encoding="utf-8").splitlines()
    return ended, [json.loads(line) for line in lines]


def test_every_stage_runs_and_finds_nothing_wrong(checked: tuple[subprocess.CompletedProcess[str], list[dict]]) -> None:
    ended, results = checked
    assert [result for result in results if result["passed"] is False] == []
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {result["stage"] for result in results} == {step.name for step in steps(quick=True)}
    assert sum(result["passed"] is True for result in results) > 12


def test_every_way_to_train_has_its_speed(checked: tuple[subprocess.CompletedProcess[str], list[dict]]) -> None:
    ended, results = checked
    speeds = {result["case"]: result for result in results if "tokens_per_s" in result}
    assert speeds.keys() == {case.name for case in CASES}
    for case in CASES:
        assert speeds[case.name]["tokens_per_s"] > 0
        assert case.name in ended.stdout
    assert len([result for result in results if result["stage"] == "profile"]) == 10
