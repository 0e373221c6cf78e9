"""A job of two nodes that is preempted saves, goes back into the queue, and ends as if it had not been stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import arguments, events, losses, run_ranks, status
from tests.support.slurm.jobs import TWO_NODES, preempt, submit, trained, words
from tests.support.slurm.mini_slurm import MiniSlurm

STEPS = 40
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def preempted(slurm: MiniSlurm, submit_folder: Path, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return a run that was preempted once, while its checkout and run file were broken, and one with a wrong run file."""
    out = tmp_path_factory.mktemp("runs") / "an out; touch pwned"
    own = submit_folder / "my run.yaml"
    own.write_text(run_file.read_text(encoding="utf-8"))
    settings = {"out": str(out), "name": "run", "steps": STEPS, "checkpoint.interval_steps": 1000}
    settings |= {"data.val": None, "log.activations_interval_steps": 1000}
    folder = out / "run"

    # Submitted from a shell that a launcher has made a rank: the job's ranks are told by Slurm all the same.
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"}
    job = submit(slurm, submit_folder, words(Path(own.name), settings), *TWO_NODES, **launched)
    wrong = submit(slurm, submit_folder, words(own, settings | {"name": "wrong", "lr": 1}), *TWO_NODES, log="wrong")
    preempt(slurm, job, trained(folder, 3))
    refused = slurm.wait_over(wrong)
    own.write_text("nonsense")
    for part in ("pretrain/train.py", "slurm/job.sh", "slurm/cluster.env", "tools/slurm_job.py"):
        (submit_folder / part).write_text("exit 9\n")

    whole = run_ranks(arguments(run_file, settings | {"name": "whole"}), out / "logs")
    assert whole.code == 0, whole.stderr
    ended = slurm.wait_over(job)
    log, wrong_log = ((submit_folder / f"{name}.txt").read_text() for name in ("job", "wrong"))
    return {
        "submitted from": submit_folder,
        "folder": folder,
        "whole": out / "whole",
        "job": ended,
        "log": log,
        "refused": refused,
        "refusal": wrong_log,
    }


def test_the_job_was_requeued_once_and_finished(preempted: dict) -> None:
    job, log = preempted["job"], preempted["log"]
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert status(preempted["folder"])["status"] == "finished"
    assert "told to stop" in log
    [saved] = events(preempted["folder"], "preempted")
    [resumed] = events(preempted["folder"], "resumed")
    assert 3 <= saved["step"] == resumed["step"] < STEPS


def test_its_losses_are_those_of_a_run_that_was_never_stopped(preempted: dict) -> None:
    assert losses(preempted["folder"]) == losses(preempted["whole"])
    assert list(losses(preempted["folder"])) == list(range(1, STEPS + 1))


def test_each_rank_has_a_log_and_the_job_has_that_of_rank_0(preempted: dict) -> None:
    folder, number = preempted["folder"], preempted["job"]["JobId"]
    assert len(json.loads((folder / "environment.json").read_text())["ranks"]) == 2
    logs = {path.name: path.read_text() for path in (folder / "logs").glob("slurm_*")}
    assert set(logs) == {f"slurm_{number}_rank_{rank}.txt" for rank in range(2)}
    for step in range(1, STEPS + 1):
        line = f" {step}/{STEPS}  loss"
        found = [text.count(line) for text in (preempted["log"], *(logs[name] for name in sorted(logs)))]
        assert found == [1, 1, 0], line


def test_the_job_runs_the_code_that_it_began_with(preempted: dict) -> None:
    snapshot = preempted["folder"] / "code" / preempted["job"]["JobId"]
    where = "import pretrain.cluster.requeue as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where],
        env={"PYTHONPATH": str(snapshot)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == snapshot / "pretrain/cluster/requeue.py"
    assert f"code in {snapshot}" in preempted["log"]
    record = json.loads((snapshot / "snapshot.json").read_text())
    assert record["packages"]["torch"]
    assert record["job"]["job_id"] == preempted["job"]["JobId"]


def test_a_wrong_run_file_ends_the_job_at_once_with_its_message(preempted: dict) -> None:
    job, log = preempted["refused"], preempted["refusal"]
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "unknown key 'lr'; did you mean" in log
    assert not (preempted["folder"].parent / "wrong").exists()


def test_no_text_of_the_user_is_executed(preempted: dict) -> None:
    places = (preempted["submitted from"], preempted["submitted from"].parent, preempted["folder"], Path.cwd())
    assert not [place for place in places if (place / "pwned").exists()]
