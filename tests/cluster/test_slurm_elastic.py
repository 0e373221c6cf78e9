"""A job that asks for one or two nodes continues on what it gets each time: two, then one, then two again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import arguments, events, losses, run_ranks, status
from tests.support.slurm.jobs import TWO_NODES, preempt, submit, trained, words
from tests.support.slurm.mini_slurm import NODES, MiniSlurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 40


def test_a_job_continues_on_the_nodes_that_it_gets(
    slurm: MiniSlurm, submit_folder: Path, run_file: Path, tmp_path: Path
) -> None:
    settings = {"out": str(tmp_path), "steps": STEPS, "data.val": None, "log.activations_interval_steps": 1000}
    settings |= {"checkpoint.interval_steps": 1000}
    whole = run_ranks(arguments(run_file, settings | {"name": "whole"}), tmp_path / "whole_logs")
    assert whole.code == 0, whole.stderr

    folder = tmp_path / "run"
    # With one task on each node Slurm would never give two: it gives no more nodes than the fewest tasks.
    some_nodes = ("--nodes=1-2", "--ntasks-per-node=2", *TWO_NODES[2:])
    job = submit(slurm, submit_folder, words(run_file, settings | {"name": "run"}), *some_nodes)
    for number, state in enumerate(("drain", "resume")):

        def has_trained(start: int = number) -> bool:
            return slurm.over(job) or (len(events(folder, "resumed")) == start and trained(folder, 3 + 10 * start)())

        slurm.wait_for(has_trained, f"steps of start {number}")
        slurm.run("scontrol", "update", f"nodename={NODES[1]}", f"state={state}", "reason=test")
        preempt(slurm, job, has_trained)
    ended, log = slurm.wait_over(job), (submit_folder / "job.txt").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2"), log
    assert status(folder)["status"] == "finished"

    starts = json.loads((folder / "slurm" / job / "attempts.json").read_text())
    assert [set(start["nodes"].split(",")) for start in starts] == [set(NODES), {NODES[0]}, set(NODES)]
    found, expected = losses(folder), losses(tmp_path / "whole")
    assert list(found) == list(range(1, STEPS + 1))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
