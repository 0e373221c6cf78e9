"""Checkpoints that are written during training, and storage that fails meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from pretrain import files
from pretrain.checkpoints.manifest import verify
from tests.support.faults import together
from tests.support.runs import (
    arguments,
    assert_refused,
    events,
    losses,
    run_ranks,
    start_ranks,
    status,
    wait_until,
)
from tests.support.selection import slow_but

BF16 = {"bf16": {"enabled": True}}
DROPOUT = {"family": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.2}
LAYOUTS = {
    "zero2_bf16": {"deepspeed": {"zero_optimization": {"stage": 2}, **BF16}, "model": DROPOUT},
    "zero3_fp32": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "zero0_bf16": {
        "deepspeed": {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}, **BF16}
    },
    "zero1_fp32": {"deepspeed": {"zero_optimization": {"stage": 1}}},
}
STEPS = 9


def settings(folder: Path, **more: object) -> dict:
    """Return a run of nine steps with a checkpoint every third, written in the background."""
    chosen = {"out": str(folder.parent), "name": folder.name, "steps": STEPS, "checkpoint.interval_steps": 3}
    return chosen | {"checkpoint.asynchronous": True, "data.val": None, "log.activations_interval_steps": 100} | more


def on_disk(change: Callable[[str, Callable[[], None]], None]) -> None:
    """Pass what torch writes to a file of this rank through `change(name, write)`. For `prepare`."""
    save = torch.save
    torch.save = lambda content, file: change(file.name, lambda: save(content, file))


def slowly(name: str, write: Callable[[], None]) -> None:
    time.sleep(0.5)
    write()


def never_at_step_6(name: str, write: Callable[[], None]) -> None:
    """Make the disk hang in the middle of the second save."""
    write()
    if "step_00000006" in name:
        time.sleep(1000)


def fail(number: int, at: str, counter: list[int], times: int, name: str, write: Callable[[], None]) -> None:
    """Make the first `times` writes to names with `at` in them fail with an error of the system."""
    if at in name and len(counter) < times:
        counter.append(1)
        raise OSError(number, os.strerror(number), name)
    write()


def failing(number: int, at: str, times: int = 1000) -> Callable[[], None]:
    return partial(on_disk, partial(fail, number, at, [], times))


@pytest.fixture(
    scope="module",
    params=slow_but(["zero2_bf16"], LAYOUTS),
)
def saved(request, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Path]:
    """Return a layout, and the folders of its run with checkpoints written at once and, slowly, in the background."""
    out, layout = tmp_path_factory.mktemp("saved"), LAYOUTS[request.param]
    at_once = settings(out / "at_once", **layout, **{"checkpoint.asynchronous": False})
    in_background = settings(out / "in_background", **layout)
    assert run_ranks(arguments(run_file, at_once), out / "logs").code == 0
    ended = run_ranks(arguments(run_file, in_background), out / "logs", prepare=partial(on_disk, slowly))
    assert ended.code == 0, ended.stderr
    return layout, out / "at_once", out / "in_background"


def test_what_is_written_in_the_background_is_the_state_of_the_step_of_the_save(saved: tuple) -> None:
    """The files are the same byte for byte, though weights, optimizer and random states changed during the write."""
    _, at_once, in_background = saved
    assert losses(in_background) == losses(at_once)
    for step in (3, 6, 9):
        name = f"checkpoints/step_{step:08d}"
        verify(in_background / name)
        there, here = (
            json.loads((run / name / "manifest.json").read_text())["files"] for run in (at_once, in_background)
        )
        own = {file for file in here if file.startswith(("deepspeed", "probe", "moments", "shards", "trainer"))}
        assert len(own) >= 5
        assert {file: here[file] for file in own} == {file: there[file] for file in own}
        assert there.keys() == here.keys()
        for rank in range(2):  # the states of Python and NumPy differ from run to run
            drawn = [torch.load(run / name / f"rng_rank_{rank}.pt")["torch"] for run in (at_once, in_background)]
            assert torch.equal(*drawn)


def test_training_goes_on_while_a_checkpoint_is_written(saved: tuple) -> None:
    _, at_once, in_background = saved
    for folder, before in ((at_once, {3: 3, 6: 6, 9: 9}), (in_background, {3: 4, 6: 7, 9: 9})):
        trained, seen = 0, {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            trained = row["step"] if row["kind"] == "train" else trained
            if row.get("event") == "checkpoint_saved":
                seen[row["step"]] = trained
        assert seen.keys() == before.keys()
        assert all(seen[step] >= before[step] for step in seen), seen
    assert not list(in_background.glob("checkpoints/.*"))
    assert (in_background / "checkpoints/latest").read_text() == "step_00000009\n"


def test_a_crash_in_a_background_write_loses_only_that_save(run_file: Path, saved: tuple, tmp_path: Path) -> None:
    layout, at_once, _ = saved
    folder = tmp_path / "run"
    words = arguments(run_file, settings(folder, **layout))
    with start_ranks(words, tmp_path / "logs", prepare=partial(on_disk, never_at_step_6)) as job:
        wait_until(lambda: max(losses(folder), default=0) >= 8, job)
        assert [path.name for path in folder.glob("checkpoints/.*")] == [".step_00000006.incomplete"]
        job.signal(signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [3]
    ended = run_ranks(words, tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    assert [event["step"] for event in events(folder, "resumed")] == [3]
    assert losses(folder) == losses(at_once)
    assert not list(folder.glob("checkpoints/.*"))


FULL = "rank 1 could not write the checkpoint"


@pytest.mark.parametrize(
    "asynchronous",
    [pytest.param(False, marks=pytest.mark.slow, id="at once"), pytest.param(True, id="in the background")],
)
def test_a_disk_that_fails_one_rank_ends_all_of_them_with_one_message(
    run_file: Path, tmp_path: Path, asynchronous: bool
) -> None:
    folder = tmp_path / "run"
    words = arguments(run_file, settings(folder, **{"checkpoint.asynchronous": asynchronous}))
    prepare = failing(errno.ENOSPC, "step_00000006.incomplete/deepspeed/zero_pp_rank_1")
    began = time.monotonic()
    ended = run_ranks(words, tmp_path / "logs", prepare=prepare)
    assert_refused(ended, FULL, "step_00000006", os.strerror(errno.ENOSPC), "The older checkpoints are intact")
    assert time.monotonic() - began < 120
    assert "trying again" not in (folder / "logs/rank_1.txt").read_text()
    assert status(folder)["status"] == "failed"
    assert os.strerror(errno.ENOSPC) in status(folder)["reason"]
    assert not list(folder.glob("checkpoints/.*"))
    assert (folder / "checkpoints/latest").read_text() == "step_00000003\n"
    verify(folder / "checkpoints/step_00000003")
    assert max(losses(folder)) == 6 if not asynchronous else max(losses(folder)) >= 6


@pytest.mark.slow
def test_storage_that_fails_for_a_moment_is_waited_for_and_the_log_says_so(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = arguments(run_file, settings(folder, steps=3))
    ended = run_ranks(words, tmp_path / "logs", prepare=failing(errno.EIO, "zero_pp_rank_1", times=2))
    assert ended.code == 0, ended.stderr
    said = [line for line in (folder / "logs/rank_1.txt").read_text().splitlines() if "trying again" in line]
    assert len(said) == 2
    assert all(os.strerror(errno.EIO) in line and "zero_pp_rank_1" in line for line in said)
    assert [line.rsplit("in ")[-1] for line in said] == ["1 s", "2 s"]
    verify(folder / "checkpoints/step_00000003")


@pytest.mark.slow
def test_storage_that_stays_away_is_a_fault_of_the_machine_on_every_rank(run_file: Path, tmp_path: Path) -> None:
    words = arguments(run_file, settings(tmp_path / "run"))
    away = failing(errno.EIO, "step_00000006.incomplete/deepspeed/zero_pp_rank_1")
    ended = run_ranks(words, tmp_path / "logs", prepare=together(impatient, away))
    assert ended.code == 3, ended.stderr
    left = status(tmp_path / "run")
    assert (left["status"], left["exit_code"]) == ("failed", 3)
    assert FULL in left["reason"]
    assert "the same command continues" in left["reason"]
    assert run_ranks(words, tmp_path / "logs").code == 0


def impatient() -> None:
    files.PAUSES_S = (0,)


def test_patience_ends(monkeypatch) -> None:
    """Seven attempts within a minute; one where waiting cannot help."""
    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)

    def attempts(error: Exception) -> int:
        tried = []

        def fail() -> None:
            tried.append(1)
            raise error

        with pytest.raises(type(error)):
            files.patiently(fail, "trying")
        return len(tried)

    assert attempts(OSError(errno.ESTALE, "stale")) == 7
    assert slept == [1, 2, 4, 8, 15, 30]
    assert attempts(RuntimeError("Io: Stale file handle (os error 116)")) == 7
    assert attempts(OSError(errno.ENOSPC, "full")) == 1
    assert attempts(ValueError("no file at all")) == 1


@pytest.mark.slow
def test_a_second_save_waits_for_the_first(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = arguments(run_file, settings(folder, steps=4, **{"checkpoint.interval_steps": 1}))
    ended = run_ranks(words, tmp_path / "logs", prepare=partial(on_disk, slowly))
    assert ended.code == 0, ended.stderr
    assert [event["step"] for event in events(folder, "checkpoint_saved")] == [1, 2, 3, 4]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["latest", "step_00000002", "step_00000003", "step_00000004"]


def test_a_stopped_run_publishes_what_is_under_way_before_it_ends(run_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = arguments(run_file, settings(folder, steps=100_000, **{"checkpoint.interval_steps": 100_000}))
    with start_ranks(words, tmp_path / "logs", prepare=partial(on_disk, slowly)) as job:
        wait_until(lambda: max(losses(folder), default=0) >= 2, job)
        job.signal(signal.SIGTERM, [0])
        assert job.wait().code == 0
    assert status(folder)["status"] == "preempted"
    verify(folder / f"checkpoints/step_{max(losses(folder)):08d}")
