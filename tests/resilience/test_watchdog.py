"""The report on a run that stands still has a line and a part for every rank, with or without a pulse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pretrain.errors import MACHINE_FAULT
from pretrain.resilience.watchdog import Pulse, describe, diagnose
from tests.support.runs import ENVIRONMENT, REPOSITORY


def pulse(rank: int, stacks: str, last: bool) -> Pulse:
    return Pulse(rank, "here", 100 + rank, time.time(), "forward", 3, 7, 2.0, stacks, False, last)


def test_a_rank_without_a_pulse_has_its_part_of_the_report_all_the_same() -> None:
    pulses = [pulse(0, "in read\n", last=True), pulse(2, "in read\n", last=True)]
    phases = ["'forward' of step 3", "'building the model' of step 0", "'forward' of step 3", ""]
    verdict, blamed = diagnose(pulses, phases)
    assert blamed == [1, 3]
    report = describe(verdict, blamed, pulses, phases)
    parts = {part.partition("\n")[0]: part for part in report.split("--- ")[1:]}
    assert list(parts) == ["rank 1", "rank 3", "rank 0, 2"]
    assert "did not answer" in parts["rank 1"]
    assert "'building the model' of step 0" in parts["rank 1"]
    assert "did not answer" in parts["rank 3"]
    assert "in read" in parts["rank 0, 2"]
    assert [line.split()[1] for line in report.splitlines() if line.startswith("rank ")] == ["0", "1", "2", "3"]


def test_a_rank_has_left_its_stacks_when_its_watchdog_is_there(tmp_path: Path) -> None:
    """A tick later the rank may already be stopped."""
    program = (
        "import os, sys, torch; from pathlib import Path; from pretrain.distributed.ranks import Ranks; "
        "from pretrain.resilience.watchdog import Watchdog\n"
        "def the_run(): Watchdog(Path(sys.argv[1]), Ranks(0, 0, 1, torch.device('cpu')), 1e6, print); os._exit(0)\n"
        "the_run()"
    )
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True, timeout=240)
    left = json.loads((tmp_path / "logs/pulses/rank_0.json").read_text(encoding="utf-8"))
    assert "in the_run" in left["stacks"]
    assert "thread MainThread:" in left["stacks"]


def test_a_flight_recorder_that_cannot_be_read_hides_no_hang(tmp_path: Path) -> None:
    program = (
        "import sys, time, torch; from pathlib import Path; from pretrain.distributed.ranks import Ranks; "
        "from pretrain.resilience import watchdog\n"
        "def fail(): raise KeyError('pg_status')\n"
        "watchdog.collective_progress = fail\n"
        "watchdog.Watchdog(Path(sys.argv[1]), Ranks(0, 0, 1, torch.device('cpu')), 0.5, print); time.sleep(100)"
    )
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, timeout=240, capture_output=True, text=True
    )
    assert ended.returncode == MACHINE_FAULT, ended.stderr
    assert "thread MainThread:" in (tmp_path / "logs/hang.txt").read_text(encoding="utf-8")
    assert "pg_status" in ended.stdout + ended.stderr
