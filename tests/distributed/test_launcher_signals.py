"""Ranks whose launcher is signalled or killed save and soon end, and nothing is lost."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.runs import (
    ENVIRONMENT,
    REPOSITORY,
    TRAIN,
    arguments,
    deepspeed,
    events,
    losses,
    run_ranks,
    status,
    torchrun,
    wait_for,
)

pytestmark = pytest.mark.slow  # tests/distributed/test_signals.py has the signals to ranks themselves
STEPS = 120
SOON_S = 30
SIGNALS = {
    "deepspeed killed": (deepspeed, signal.SIGKILL, False),
    "deepspeed SIGTERM": (deepspeed, signal.SIGTERM, False),
    "deepspeed SIGUSR1": (deepspeed, signal.SIGUSR1, False),
    "deepspeed Ctrl-C": (deepspeed, signal.SIGINT, True),
    "deepspeed, its terminal closes": (deepspeed, signal.SIGHUP, True),
    "torchrun killed": (torchrun, signal.SIGKILL, False),
    "torchrun SIGTERM": (torchrun, signal.SIGTERM, False),
    "torchrun SIGUSR1": (torchrun, signal.SIGUSR1, False),
    "torchrun Ctrl-C": (torchrun, signal.SIGINT, True),
    "torchrun, its terminal closes": (torchrun, signal.SIGHUP, True),
}


@pytest.fixture(scope="module")
def whole(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    out = tmp_path_factory.mktemp("whole")
    assert run_ranks(arguments(run_file, settings(out)), out / "logs").code == 0
    return losses(out / "run")


def settings(out: Path) -> dict:
    chosen = {"out": str(out), "name": "run", "steps": STEPS, "data.val": None, "checkpoint.interval_steps": STEPS}
    return chosen | {"log.activations_interval_steps": STEPS, "log.weights_interval_steps": STEPS}


@pytest.mark.parametrize("name", SIGNALS)
def test_the_ranks_save_and_end_when_their_launcher_is_told_to(
    run_file: Path, tmp_path: Path, whole: dict, name: str
) -> None:
    launcher, number, to_all = SIGNALS[name]
    words, folder = arguments(run_file, settings(tmp_path)), tmp_path / "run"
    (process,) = launcher(words)
    while len(losses(folder)) < 3 and process.poll() is None:
        time.sleep(0.05)
    ranks = ranks_below(process.pid)
    (os.killpg if to_all else os.kill)(process.pid, number)  # a terminal's Ctrl-C reaches launcher and ranks
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=SOON_S)
    assert not alive, f"still there after {time.monotonic() - began:.0f} s"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wait_for([process])

    left = status(folder)
    assert left["status"] == "preempted"
    assert 3 <= left["step"] < STEPS
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [left["step"]]
    assert run_ranks(words, tmp_path / "logs").code == 0
    assert losses(folder) == whole


def test_a_run_whose_terminal_closes_saves(run_file: Path, tmp_path: Path) -> None:
    """From then on its output is not read, either."""
    words, folder = arguments(run_file, settings(tmp_path) | {"steps": 100_000}), tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, str(REPOSITORY / TRAIN), *words])
    while len(losses(folder)) < 3:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    left = status(folder)
    assert (left["status"], left["reason"]) == ("preempted", "stopped by SIGHUP after saving")
    assert events(folder, "checkpoint_saved")[-1]["step"] == left["step"]


def ranks_below(launcher: int) -> list[psutil.Process]:
    """Return the processes below a launcher that run train.py themselves."""
    children = psutil.Process(launcher).children(recursive=True)
    ranks = [child for child in children if "LOCAL_RANK" in child.environ()]
    assert len(ranks) == 2
    return ranks
