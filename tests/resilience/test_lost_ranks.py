"""A rank that is killed or stands still soon ends the run, with a reason, and the same command resumes it with no trace."""

from __future__ import annotations

import json
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.faults import at_phase, gpu_that_hangs, send, sleep_for_ever
from tests.support.runs import Ended, arguments, losses, run_together, start_ranks, status
from tests.support.selection import asked_for, slow_but

STEPS = 8
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# name: (phase, step, rank)
KILLS = {
    "data": ("waiting for data", 5, 0),
    "forward": ("forward", 5, 1),
    "backward": ("backward", 5, 0),
    "optimizer": ("optimizer", 5, 1),
    "tvr": ("methods", 4, 1),
    "evaluation": ("evaluation", 6, 0),
    "save": ("saving", 6, 1),
    "save_of_rank_0": ("saving", 6, 0),
}
FAST_KILLS = ("backward", "save_of_rank_0")
WATCHDOG_S = 6
# name: (phase, step, rank, what the rank does, what the verdict says of it)
HANGS = {
    "stopped": ("backward", 3, 1, send(STOP), ("No answer from rank 1 (", "in 'backward' of step 3")),
    "rank_0_stopped": (
        "waiting for data",
        4,
        0,
        send(STOP),
        ("No answer from rank 0 (", "in 'waiting for data' of step 4"),
    ),
    "stuck": ("methods", 2, 1, sleep_for_ever, ("The others wait for rank 1 (", "in 'methods' of step 2 for")),
}
FAST_HANGS = ("stopped", "stuck")


def settings(out: Path, name: str) -> dict:
    """Return a run in which TVR acts at every second step, so at step 4, with checkpoints at 3 and 6."""
    chosen = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 3, "eval.interval_steps": 6}
    return chosen | {"methods.1.interval_steps": 2}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def whole(run_file: Path, out: Path) -> dict[int, float]:
    (ended,) = run_together({"whole": (arguments(run_file, settings(out, "whole")), 2)}, out / "logs").values()
    assert ended.code == 0
    return losses(out / "whole")


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, run_file: Path, out: Path) -> dict[str, tuple[Ended, float]]:
    """Return the remains of each run with a killed rank, and the seconds from its death to the end of the others."""
    found = {}
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(
                start_ranks(
                    arguments(run_file, settings(out, name)),
                    out / "logs" / name,
                    prepare=at_phase(*where, send(KILL)),
                )
            )
            for name, where in asked_for(request, KILLS).items()
        }
        died: dict[str, float] = {}
        while len(found) < len(jobs):
            for name, job in jobs.items():
                if name not in died and not job.processes[KILLS[name][2]].is_alive():
                    died[name] = time.monotonic()
                if name not in found and not job.running:
                    found[name] = job.wait(), time.monotonic() - died[name]
            time.sleep(0.02)
    return found


@pytest.mark.parametrize("name", slow_but(FAST_KILLS, KILLS))
def test_when_a_rank_is_killed_the_rest_ends_soon_and_says_why(killed: dict, out: Path, name: str) -> None:
    *_, rank = KILLS[name]
    ended, seconds = killed[name]
    assert ended.codes[rank] == -KILL
    assert ended.codes[1 - rank] == 3, ended.stderr
    assert seconds < 30
    left = status(out / name)
    assert (left["status"], left["exit_code"]) == ("failed", 3)
    assert "lost another rank in" in left["reason"]
    assert "Traceback" not in ended.stderr


def test_killed_runs_go_on_with_the_losses_of_one_that_was_not_killed(
    killed: dict, whole: dict, run_file: Path, out: Path
) -> None:
    commands = {name: (arguments(run_file, settings(out, name)), 2) for name in killed}
    for name, ended in run_together(commands, out / "again").items():
        assert ended.code == 0, name
        assert losses(out / name) == whole, name
        assert status(out / name)["status"] == "finished", name


@pytest.fixture(scope="module")
def hung(request: pytest.FixtureRequest, run_file: Path, out: Path) -> dict[str, tuple[Ended, list[bool], float]]:
    """Return the remains of each run with a rank that stands still, the ranks that survived it, and its seconds."""
    found, began = {}, time.monotonic()
    with ExitStack() as stack:
        jobs = {}
        for name, (*where, action, _) in asked_for(request, HANGS).items():
            words = arguments(run_file, settings(out, name) | {"resilience.watchdog_s": WATCHDOG_S})
            jobs[name] = stack.enter_context(start_ranks(words, out / "logs" / name, prepare=at_phase(*where, action)))
        for name, job in jobs.items():
            live = [process for rank, process in enumerate(job.processes) if rank != HANGS[name][2] or name == "stuck"]
            for process in live:
                process.join(120)
            seconds = time.monotonic() - began
            alive = [process.is_alive() for process in job.processes]
            job.signal(KILL)
            found[name] = job.wait(), alive, seconds
    return found


@pytest.mark.parametrize("name", slow_but(FAST_HANGS, HANGS))
def test_a_rank_that_stands_still_is_named_with_its_phase_and_all_stacks(hung: dict, out: Path, name: str) -> None:
    _, _, rank, _, parts = HANGS[name]
    ended, alive, _ = hung[name]
    assert ended.codes[1 - rank] == 3, ended.stderr
    assert alive == [name != "stuck" and each == rank for each in range(2)]
    left = status(out / name)
    assert (left["status"], left["exit_code"]) == ("failed", 3)
    for part in parts:
        assert part in left["reason"]
        assert part in ended.stdout
    report = (out / name / "logs/hang.txt").read_text()
    heads = re.findall("^--- rank (.*)$", report, re.MULTILINE)  # ranks with the same stacks share one
    assert [int(number) for head in heads for number in head.split(", ")] == [rank, 1 - rank]
    assert report.count("thread MainThread:") == len(heads)
    if name == "stuck":
        assert ended.code == 3
        assert "in sleep_for_ever" in report


def test_a_rank_whose_gpu_hangs_is_named_though_all_ranks_wait(run_file: Path, out: Path) -> None:
    """Its stack is that of a rank that waits for others, in the phase that they are in too. Its collectives tell it apart."""
    words = arguments(run_file, settings(out, "gpu_hangs") | {"resilience.watchdog_s": WATCHDOG_S})
    with start_ranks(words, out / "logs/gpu_hangs", prepare=gpu_that_hangs(rank=1, step=3)) as job:
        assert job.wait().code == 3
    assert "The others wait for rank 1 (" in status(out / "gpu_hangs")["reason"]
    assert "in 'optimizer' of step 3" in status(out / "gpu_hangs")["reason"]
    pulses = [json.loads((out / f"gpu_hangs/logs/pulses/rank_{rank}.json").read_text()) for rank in range(2)]
    assert all(pulse["waits"] and pulse["phase"] == "optimizer" for pulse in pulses)
    assert pulses[0]["number"] == pulses[1]["number"]
    assert "not completed" in (out / "gpu_hangs/logs/hang.txt").read_text()


@pytest.mark.slow
def test_hung_runs_go_on_with_the_losses_of_one_that_was_not(
    hung: dict, whole: dict, run_file: Path, out: Path
) -> None:
    commands = {name: (arguments(run_file, settings(out, name)), 2) for name in hung}
    for name, ended in run_together(commands, out / "again").items():
        assert ended.code == 0, name
        assert losses(out / name) == whole, name
