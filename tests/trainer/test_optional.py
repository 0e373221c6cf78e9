"""Faults of parts that training does not need end no run: trackers, disks for rows, consoles, probes, autopsies."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from math import nan
from pathlib import Path

import psutil
import pytest
import torch

from pretrain.monitor.wandb_files import history, history_steps
from tests.support.faults import at_phase, bad_batches, together
from tests.support.runs import REPOSITORY, Ended, arguments, events, rows, start_ranks, status, wait_until
from tests.support.wandb_server import KEY, WandbServer

STEPS = 8
KINDS = ("train", "eval", "weights", "activations")
TIMES = {"time", "tokens_per_s", "step_time_s", "data_wait", "mfu", "memory_bytes"}
REASONS = {
    "no_key": "No API key configured",
    "refused": "Failed to get resume status",
    "silent": "",
    "missing": "No module named wandb",
    "killed": "Connection lost",
}
ONLINE = {"log.wandb.mode": "online"}


def with_environment(variables: dict[str, str]) -> None:
    """Set the environment of a user's shell, with no variables of wandb except `variables`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update({"HOME": "/nonexistent", "WANDB_INIT_TIMEOUT": "3", **variables})


def kill_wandb_core() -> None:
    """Kill wandb's own process once it has begun to take rows."""
    folder = Path(sys.argv[sys.argv.index("--set") + 1].removeprefix("out=").strip('"')) / "killed"
    while "tracked by wandb" not in (folder / "log.txt").read_text():
        look_after_tracker()
        time.sleep(0.05)
    [core] = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
    os.kill(core.pid, signal.SIGKILL)
    time.sleep(3)  # the next row finds it gone


def keep_tracker() -> None:
    from pretrain.monitor.tracker import Tracker

    start = Tracker.__init__

    def start_and_keep(self: Tracker, *given: object) -> None:
        start(self, *given)
        _kept.append(self)

    Tracker.__init__ = start_and_keep


_kept: list = []


def look_after_tracker() -> None:
    _kept[0].look()


def without_a_reader() -> None:
    """Make stdout a pipe without a reader, as after `| head`."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    from pretrain import startup

    startup.begin()  # as train.py does, whose standard output was another one when this process began


def full_disk(first: int, last: int) -> None:
    """Let the writes number `first` to `last` to metrics.jsonl and log.txt get only half a line onto the disk."""
    from pretrain.monitor import lines

    write, calls = os.write, [0]

    def write_what_fits(descriptor: int, content: bytes) -> int:
        calls[0] += 1
        if not first <= calls[0] <= last:
            return write(descriptor, content)
        if len(content) > 1 and calls[0] % 2:
            return write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines.os = type(sys)("os")
    lines.os.__dict__.update(os.__dict__, write=write_what_fits)


def blind_figures() -> None:
    """Let the disk, git and the packages give no information."""
    import shutil
    from importlib import metadata

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def not_found(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    shutil.disk_usage, metadata.version = fail, not_found
    os.environ["PATH"] = "/nonexistent"


def probe_that_fails(rank: int) -> None:
    """Let only the last of four probes on two ranks give a row, without the statistics of `rank`.

    The first cannot be hooked in on `rank`; the second fails in the middle, on all; the third at its end, on `rank`.
    """
    from pretrain.monitor import activations, phase
    from pretrain.trainer import trainer

    here = int(os.environ["RANK"]) == rank
    record, probe, calls, passes = trainer.record_activations, trainer.probe_logits, [0], [0]

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no memory today")

    def probe_or_fail(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if phase.current().name != "activations":
            return probe(model, tokens)
        passes[0] += 1
        hook = model.model.layers[1].register_forward_hook(out_of_memory) if passes[0] == 1 else None
        try:
            logits = probe(model, tokens)
        finally:
            if hook:
                hook.remove()
        if here and passes[0] == 2:
            out_of_memory()
        return logits

    trainer.probe_logits = probe_or_fail
    if not here:
        return

    def record_or_fail(model: object) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("no hooks today")
        return record(model)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no statistics today")

    trainer.record_activations, activations._statistics = record_or_fail, fail


def autopsies_that_cannot_be_written() -> None:
    from pretrain.autopsy.autopsies import Autopsies

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Autopsies._write = fail


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optional")


@pytest.fixture(scope="module")
def silent_server() -> Iterator[str]:
    """Yield the address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def ended(run_file: Path, out: Path, silent_server: str) -> dict[str, Ended]:
    """Run on one rank, each time with a part that fails, and once without faults and tracking."""
    stub = out / "stub"
    stub.mkdir()
    (stub / "wandb.py").write_text('raise ModuleNotFoundError("No module named wandb", name="wandb")')
    core_dies = (keep_tracker, at_phase("forward", 4, 0, kill_wandb_core))
    offline = {"WANDB_MODE": "offline"}
    cases: dict[str, tuple[dict, tuple[Callable, ...]]] = {
        "whole": ({}, ()),
        "no_key": (ONLINE, (partial(with_environment, {}),)),
        "refused": (
            ONLINE,
            (partial(with_environment, {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}),),
        ),
        "silent": (ONLINE, (partial(with_environment, {"WANDB_BASE_URL": silent_server, "WANDB_API_KEY": KEY}),)),
        "missing": (ONLINE, (partial(with_environment, {"PYTHONPATH": str(stub)}),)),
        "killed": (ONLINE, (partial(with_environment, offline), *core_dies)),
        "not_tracked": ({}, (partial(with_environment, {"WANDB_MODE": "online"}),)),
        "console": ({}, (without_a_reader,)),
        "full": ({}, (partial(full_disk, 9, 24),)),
        "blind": ({}, (blind_figures,)),
    }
    with ExitStack() as stack:
        jobs = {}
        for name, (settings, faults) in cases.items():
            words = arguments(run_file, {"out": str(out), "name": name, "steps": STEPS, **settings})
            jobs[name] = stack.enter_context(start_ranks(words, out / "l" / name, 1, prepare=together(*faults)))
        return {name: job.wait() for name, job in jobs.items()}


def numbers(folder: Path) -> list[dict]:
    """Return all rows except events, without the fields that depend on the clock."""
    found = [row for kind in KINDS for row in rows(folder, kind)]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


CASES = ("no_key", "refused", "silent", "missing", "killed", "not_tracked", "console", "full", "blind")


@pytest.mark.parametrize("name", CASES)
def test_the_run_ends_as_one_without_the_fault_and_has_its_rows(ended: dict, out: Path, name: str) -> None:
    assert ended[name].code == 0, ended[name].stdout + ended[name].stderr
    assert (
        status(out / name) == status(out / "whole") == {"status": "finished", "step": STEPS, "reason": "all steps done"}
    )
    assert len(numbers(out / "whole")) == STEPS + 2 + 2 + 2
    assert numbers(out / name) == numbers(out / "whole")


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_why_nothing_is_tracked_is_logged_once(ended: dict, out: Path, name: str) -> None:
    assert ended[name].stdout.count("tracking is off: ") == 1
    assert "tools/sync_wandb.py" in ended[name].stdout
    [event] = events(out / name, "tracking_off")
    assert REASONS[name] in event["reason"] != ""
    assert "Traceback" not in ended[name].stdout + ended[name].stderr


def test_a_run_whose_file_disables_tracking_is_not_tracked_by_the_environment(ended: dict, out: Path) -> None:
    assert not events(out / "not_tracked", "tracking_off")
    assert not (out / "not_tracked/wandb_id").exists()


def test_a_console_without_a_reader_leaves_the_log(ended: dict, out: Path) -> None:
    logged = (out / "console/log.txt").read_text()
    assert f"finished at step {STEPS}" in logged
    assert "Traceback" not in ended["console"].stderr
    assert "Logging error" not in ended["console"].stderr
    assert ended["console"].stdout == ""


def test_rows_and_log_lines_wait_for_room_and_no_line_is_torn(ended: dict, out: Path) -> None:
    for line in (out / "full/metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["kind"]
    assert "No space left on device" in ended["full"].stdout
    unchanged = [line.split("tokens/s")[0][20:90] for line in (out / "whole/log.txt").read_text().splitlines()]
    waited = [line.split("tokens/s")[0][20:90] for line in (out / "full/log.txt").read_text().splitlines()]
    steps = [[line[:40] for line in lines if line.startswith("step")] for lines in (unchanged, waited)]
    assert steps[0] == steps[1] != []


def test_facts_that_are_not_known_are_left_out(ended: dict, out: Path) -> None:
    assert "how much is free is not known" in ended["blind"].stdout
    environment = json.loads((out / "blind/environment.json").read_text())
    assert environment["git_revision"] is None
    assert set(environment["packages"].values()) == {None}


def sync(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "tools/sync_wandb.py", str(folder)]
    environment = inherited | {"HOME": "/nonexistent", "WANDB_SILENT": "true", **variables}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_rows_that_a_dead_process_did_not_write_are_added_to_the_offline_files_once(ended: dict, out: Path) -> None:
    folder = out / "killed"
    done = sync(folder, {"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    written = [list(history(file)) for file in files]
    assert written[1], "the rest is in a file of its own"
    expected = [row for row in rows_in_order(folder) if row["kind"] != "event"]
    assert [row["_step"] for part in written for row in part] == list(range(len(expected)))
    for found, row in zip([row for part in written for row in part], expected, strict=True):
        assert (found["step"], found["_timestamp"]) == (row["step"], row["time"])
        if row["kind"] == "train":
            assert found["train/loss"] == pytest.approx(row["loss"])


@pytest.mark.slow
def test_a_server_gets_each_row_once_however_often_it_is_asked(ended: dict, out: Path) -> None:
    folder = out / "refused"
    expected = [row for row in rows_in_order(folder) if row["kind"] != "event"]
    with WandbServer() as server:
        for said in (f"{len(expected)} rows sent, 0 were there", f"0 rows sent, {len(expected)} were there"):
            done = sync(folder, server.environment)
            assert done.returncode == 0, done.stderr
            assert said in done.stdout
            [(run_id, history)] = server.histories.items()
            assert [row["_step"] for row in history] == list(range(len(expected)))
            assert [row["step"] for row in history] == [row["step"] for row in expected]
    assert run_id == (folder / "wandb_id").read_text()


def test_sync_without_a_key_or_a_run_is_refused(ended: dict, out: Path) -> None:
    cases: list[tuple[Path, dict, str]] = [
        (out / "no_key", {}, "No API key configured"),
        (out / "no_key", {"WANDB_MODE": "disabled"}, "WANDB_MODE is 'disabled': only online and offline track a run"),
        (out, {}, "is no run folder"),
    ]
    for folder, variables, part in cases:
        done = sync(folder, variables)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert part in done.stderr


def rows_in_order(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_probe_that_fails_on_one_rank_and_an_autopsy_that_cannot_be_written_end_nothing(
    run_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = {"steps": STEPS, "log.activations_interval_steps": 2}
    words = arguments(run_file, {"out": str(tmp_path), "name": "run", **settings})
    faults = (partial(probe_that_fails, 1), autopsies_that_cannot_be_written, bad_batches(24, 31, nan))
    with start_ranks(words, tmp_path / "l", 2, prepare=together(*faults)) as job:
        ended = job.wait()
    assert ended.code == 0, ended.stdout + ended.stderr
    assert [row["step"] for row in rows(folder, "activations")] == [8]
    assert [layer["layer"] for layer in rows(folder, "activations")[0]["layers"]] == [1, 2]
    without = [f"{row['what']} at {row['step']}: {row['reason']}" for row in events(folder, "went_without")]
    for row, parts in zip(
        without,
        (
            ("activations at 2", "RuntimeError('no hooks today') on rank 1"),
            ("autopsy at 4", "No space left on device"),
            ("activations at 4", "MemoryError('no memory today') on rank 0"),
        ),
        strict=True,
    ):
        assert all(part in row for part in parts), without
    assert "no statistics today" in (folder / "logs/rank_1.txt").read_text()
    assert [row["step"] for row in events(folder, "not_finite")] == [4]


def test_a_tracked_run_that_is_stopped_or_killed_ends_so_and_wandb_gets_the_rows(
    run_file: Path, tmp_path: Path
) -> None:
    signals = {"stopped": signal.SIGINT, "lost": signal.SIGKILL}
    settings = {"steps": 100_000, "checkpoint.interval_steps": 100_000, "data.val": None, "log.wandb.mode": "offline"}
    settings |= {"log.activations_interval_steps": 100_000}
    with ExitStack() as stack:
        jobs = {}
        for name in signals:
            words = arguments(run_file, {"out": str(tmp_path), "name": name, **settings})
            start = start_ranks(words, tmp_path / "l" / name, 1, prepare=partial(with_environment, {}))
            jobs[name] = stack.enter_context(start)
        for name, job in jobs.items():
            log = tmp_path / name / "log.txt"
            wait_until(lambda log=log: log.exists() and "tracked by wandb" in log.read_text(), job)
            job.signal(signals[name])
        ended = {name: job.wait() for name, job in jobs.items()}
    assert (ended["stopped"].code, ended["lost"].code) == (0, -signal.SIGKILL)
    assert status(tmp_path / "stopped")["status"] == "preempted"
    for name in signals:
        expected = len([row for row in rows_in_order(tmp_path / name) if row["kind"] != "event"])
        deadline = time.monotonic() + 120  # wandb's process goes on by itself
        while rows_in_files(tmp_path / name) != list(range(expected)):
            assert time.monotonic() < deadline, name
            time.sleep(0.2)


def rows_in_files(folder: Path) -> list[int]:
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [step for file in files for step in history_steps(file)]
