"""tools/soak.py as a user runs it, with a few faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import arguments, launch


@pytest.mark.slow
def test_a_short_soak_reports_its_faults_and_that_nothing_was_lost(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak"
    words = arguments(run_file, {"steps": 60, "checkpoint.interval_steps": 5, "checkpoint.asynchronous": True})
    ended = launch([sys.executable, "tools/soak.py", *words, "--out", str(out), "--kills", "4", "--seed", "3"])
    assert ended.code == 0, ended.stderr
    assert "4 faults; every run ended with the losses of one that was left alone, bit for bit" in ended.stdout
    trials = json.loads((out / "soak.json").read_text())
    assert len(trials) == 4
    assert all(trial["seconds"] < 60 for trial in trials)
    assert launch([sys.executable, "tools/soak.py", *words, "--out", str(out)]).code == 2
