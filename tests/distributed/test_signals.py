"""A run that is asked to stop saves first, on all ranks at the same step, and the same command then resumes it."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.runs import (
    arguments,
    assert_refused,
    contents,
    events,
    losses,
    run_ranks,
    run_together,
    start_ranks,
    status,
    wait_until,
)
from tests.support.selection import asked_for, slow_but

STEPS = 30
STOPS = {
    "SIGTERM to rank 0": (signal.SIGTERM, [0]),
    "SIGTERM to rank 1": (signal.SIGTERM, [1]),
    "SIGUSR1 to all": (signal.SIGUSR1, [0, 1]),
    "SIGINT to all": (signal.SIGINT, [0, 1]),
    "SIGHUP to all": (signal.SIGHUP, [0, 1]),
}

FAST = ("SIGTERM to rank 1", "SIGUSR1 to all")


@pytest.fixture(scope="module")
def stopped(
    request: pytest.FixtureRequest, run_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, dict, dict]:
    """Return the losses of an uninterrupted run, the remains of each signalled run, and those after a second start."""
    out, stops = tmp_path_factory.mktemp("signals"), asked_for(request, STOPS)

    def words(name: str) -> list[str]:
        settings = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 100}
        return arguments(run_file, settings | {"data.val": None, "log.activations_interval_steps": 100})

    folders = {name: out / name.replace(" ", "_") for name in stops}
    first = {}
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(start_ranks(words(folders[name].name), out / "logs" / name)) for name in stops
        }
        waiting = dict(stops)
        while waiting:
            ready = [name for name in waiting if len(losses(folders[name])) >= 3 or not jobs[name].running]
            for name in ready:
                jobs[name].signal(*waiting.pop(name))
            time.sleep(0.01)
        for name, job in jobs.items():
            ended = job.wait()
            saved = [event["step"] for event in events(folders[name], "checkpoint_saved")]
            first[name] = (ended, status(folders[name]), saved, max(losses(folders[name])))
    commands = {name: (words(folders[name].name), 2) for name in stops}
    again = run_together({"whole": (words("whole"), 2), **commands}, out / "again")
    assert again.pop("whole").code == 0
    second = {name: (ended, status(folders[name]), losses(folders[name])) for name, ended in again.items()}
    return losses(out / "whole"), first, second


@pytest.mark.parametrize("name", slow_but(FAST, STOPS))
def test_a_signal_to_some_rank_stops_all_at_one_step_after_saving_with_exit_code_0(stopped: tuple, name: str) -> None:
    ended, left, saved, last_step = stopped[1][name]
    assert ended.code == 0
    number = STOPS[name][0]
    assert left == {"status": "preempted", "step": last_step, "reason": f"stopped by {number.name} after saving"}
    assert 3 <= last_step < STEPS
    assert saved == [last_step]
    assert f"preempted at step {last_step}" in ended.stdout


@pytest.mark.parametrize("name", slow_but(FAST, STOPS))
def test_the_same_command_finishes_a_stopped_run_with_the_losses_of_one_that_was_not_stopped(
    stopped: tuple, name: str
) -> None:
    whole, first, second = stopped
    ended, left, found = second[name]
    assert ended.code == 0
    assert f"at step {first[name][3]}" in ended.stdout
    assert left == {"status": "finished", "step": STEPS, "reason": "all steps done"}
    assert found == whole
    assert list(found) == list(range(1, STEPS + 1))


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"out": str(tmp_path), "name": "run", "steps": 100_000, "checkpoint.interval_steps": 100_000}
    words = arguments(run_file, settings | {"data.val": None, "log.activations_interval_steps": 100_000})
    with start_ranks(words, tmp_path / "first", ranks=1) as job:
        wait_until(lambda: len(losses(folder)) >= 2, job)
        written = contents(folder)
        assert_refused(run_ranks(words, tmp_path / "second", ranks=1), "another run is writing to", str(folder))
        now = contents(folder)
        assert {name for name in written if now.get(name) != written[name]} <= {"metrics.jsonl"}
        assert not events(folder, "resumed")
        steps = len(losses(folder))
        wait_until(lambda: len(losses(folder)) > steps, job)
        job.signal(signal.SIGTERM)
        assert job.wait().code == 0
    assert status(folder)["status"] == "preempted"
