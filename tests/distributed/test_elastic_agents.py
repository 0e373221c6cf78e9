"""torchrun with a range of nodes: when one of them leaves, the run goes on with those that are left."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.runs import (
    PATIENCE_S,
    TRAIN,
    arguments,
    events,
    free_port,
    losses,
    open_process,
    status,
    wait_for,
)

SETTINGS = {"steps": 100_000, "checkpoint.interval_steps": 2, "eval.interval_steps": 100_000}


def agent(port: int, words: list[str], *, is_host: bool) -> subprocess.Popen:
    """Start the agent of one node, with one rank. One of them is also the meeting point."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    patience = f"--rdzv-conf=is_host={is_host},last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    size = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    return open_process(["torchrun", *size, *meeting, patience, TRAIN, *words])


def fail(node: subprocess.Popen) -> None:
    """Kill an agent and its rank at once, as when a machine fails: a rank that sees its agent end stops the run in order."""
    ranks = psutil.Process(node.pid).children(recursive=True)
    for rank in ranks:
        rank.suspend()
    node.kill()
    for rank in ranks:
        rank.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_goes_on_with_the_node_that_is_left(run_file: Path, tmp_path: Path) -> None:
    folder, port = tmp_path / "elastic", free_port()
    words = arguments(run_file, {"out": str(tmp_path), "name": "elastic", **SETTINGS})
    first = agent(port, words, is_host=True)
    leaving = agent(port, words, is_host=False)
    try:
        wait_until(lambda: max(losses(folder), default=0) >= 6, first)
        assert [event["world_size"] for event in events(folder, "started")] == [2]
        fail(leaving)
        wait_until(lambda: bool(events(folder, "resumed")), first)
        [resumed] = events(folder, "resumed")
        assert resumed["world_size"] == 1
        assert resumed["step"] >= 4
        wait_until(lambda: max(losses(folder)) >= resumed["step"] + 4, first)
        (folder / "STOP").touch()
        ended = wait_for([first])
    finally:
        for process in (first, leaving):
            if process.poll() is None:
                fail(process)
    assert ended.code == 0, ended.stderr[-3000:]
    assert "ranks 2 -> 1" in ended.stdout
    assert status(folder)["status"] == "stopped"
