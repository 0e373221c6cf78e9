"""A request to stop is handled in every phase of a run, and nothing is lost."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.faults import at_phase, send, storage_that_hangs
from tests.support.runs import (
    Job,
    arguments,
    events,
    last_rows,
    losses,
    rows,
    run_ranks,
    run_together,
    start_ranks,
    status,
    wait_until,
)
from tests.support.selection import asked_for, slow_but

STEPS = 8
TERM, USR1, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
# name: (phase, step, rank, signals, the steps done when the run stops)
STOPS = {
    "build": ("building the model", 0, 1, (TERM,), 0),
    "init": ("initializing weights", 0, 0, (USR1,), 0),
    "data": ("waiting for data", 3, 1, (USR1,), 2),
    "forward": ("forward", 3, 1, (TERM,), 3),
    "backward": ("backward", 3, 0, (INT,), 3),
    "methods": ("methods", 2, 1, (HUP,), 2),
    "evaluation": ("evaluation", 4, 1, (TERM,), 4),
    "evaluation_at_the_end": ("evaluation", 8, 0, (USR1,), 8),
    "activations": ("activations", 4, 0, (INT,), 4),
    "save": ("saving", 4, 1, (TERM, TERM, INT), 4),
}

FAST = ("backward", "save")


@pytest.fixture(scope="module")
def stopped(
    request: pytest.FixtureRequest, run_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict, dict]:
    """Return the folder of all runs, the state of each stopped run, and the output of the same commands started again."""
    out, stops = tmp_path_factory.mktemp("phases"), asked_for(request, STOPS)

    def words(name: str) -> list[str]:
        settings = {"out": str(out), "name": name, "steps": STEPS, "checkpoint.interval_steps": 4}
        return arguments(run_file, settings | {"eval.interval_steps": 4, "log.activations_interval_steps": 4})

    first = {}
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(
                start_ranks(words(name), out / "logs" / name, prepare=at_phase(*where, send(*numbers)))
            )
            for name, (*where, numbers, _) in stops.items()
        }
        for name, job in jobs.items():
            ended = job.wait()
            saved = [event["step"] for event in events(out / name, "checkpoint_saved")]
            first[name] = (ended, status(out / name), saved, rows(out / name, "eval"))
    commands = {name: (words(name), 2) for name in stops}
    again = run_together({"whole": (words("whole"), 2), **commands}, out / "again")
    return out, first, again


@pytest.mark.parametrize("name", slow_but(FAST, STOPS))
def test_a_stop_in_any_phase_is_handled_and_the_state_saved(stopped: tuple, name: str) -> None:
    _, first, _ = stopped
    ended, left, saved, evaluated = first[name]
    *_, numbers, step = STOPS[name]
    assert ended.code == 0, ended.stderr
    assert left == {
        "status": "preempted",
        "step": step,
        "reason": f"stopped by {numbers[-1].name}{' after saving' * (step > 0)}",
    }
    assert saved[-1:] == ([step] if step else [])
    if name.startswith("evaluation"):
        assert step not in {row["step"] for row in evaluated}


@pytest.mark.parametrize("name", slow_but(FAST, STOPS))
def test_the_same_command_ends_the_run_as_if_it_had_not_been_stopped(stopped: tuple, name: str) -> None:
    out, _, again = stopped
    assert again[name].code == again["whole"].code == 0
    assert status(out / name) == {"status": "finished", "step": STEPS, "reason": "all steps done"}
    assert losses(out / name) == losses(out / "whole")
    assert list(losses(out / name)) == list(range(1, STEPS + 1))
    evaluations, whole = ({s: r["loss"] for s, r in last_rows(out / n, "eval").items()} for n in (name, "whole"))
    assert evaluations == whole
    assert set(whole) == {4, 8}


def settings(out: Path, **more: object) -> dict:
    chosen = {"out": str(out), "name": "run", "steps": 100_000, "data.val": None}
    return chosen | {"checkpoint.interval_steps": 100_000, "log.activations_interval_steps": 100_000} | more


def wait_until_still(job: Job, folder: Path) -> None:
    """Wait until no step has ended for two seconds: the batches that were read ahead are used up."""
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < 2:
        assert job.running
        if (steps := len(losses(folder))) > seen:
            seen, since = steps, time.monotonic()
        time.sleep(0.05)


def test_a_stop_is_handled_while_another_rank_waits_for_data_that_does_not_come(run_file: Path, tmp_path: Path) -> None:
    words, folder = arguments(run_file, settings(tmp_path)), tmp_path / "run"
    with start_ranks(words, tmp_path / "logs", prepare=storage_that_hangs(rank=1, after=4)) as job:
        wait_until(lambda: bool(losses(folder)), job)
        wait_until_still(job, folder)
        job.signal(signal.SIGTERM, [0])
        ended = job.wait()
    assert ended.code == 0
    assert status(folder)["status"] == "preempted"
    assert events(folder, "checkpoint_saved")[-1]["step"] == status(folder)["step"]


def test_a_file_asks_for_a_save_and_another_for_the_end(run_file: Path, tmp_path: Path) -> None:
    words, folder = arguments(run_file, settings(tmp_path)), tmp_path / "run"
    with start_ranks(words, tmp_path / "logs") as job:
        wait_until(lambda: len(losses(folder)) >= 2, job)
        (folder / "SAVE").touch()
        wait_until(lambda: bool(events(folder, "checkpoint_saved")), job)
        wait_until(lambda: not (folder / "SAVE").exists(), job)
        saved = events(folder, "checkpoint_saved")[0]["step"]
        wait_until(lambda: max(losses(folder)) > saved, job)
        (folder / "STOP").touch()
        ended = job.wait()
    assert ended.code == 0
    left = status(folder)
    assert (left["status"], left["reason"]) == ("stopped", "stopped by the file STOP after saving")
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [saved, left["step"]]

    again = run_ranks(words, tmp_path / "again")
    assert again.code == 0
    assert "not started: stopped by the file STOP" in again.stdout
    assert status(folder) == left
    (folder / "STOP").unlink()
    assert run_ranks(arguments(run_file, settings(tmp_path, steps=left["step"] + 1)), tmp_path / "again").code == 0
    assert status(folder)["status"] == "finished"
