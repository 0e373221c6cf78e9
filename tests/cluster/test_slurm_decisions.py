"""The end of jobs whose ranks end in various ways. Everything is real except the trainer, which only ends."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY, status
from tests.support.slurm.jobs import ONE_NODE, TWO_NODES, submit, words
from tests.support.slurm.mini_slurm import NODES, MiniSlurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SICK_NODE = """\
import os, sys
sick = "needs-another-node" in " ".join(sys.argv) and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
print(f"{os.environ['SLURMD_NODENAME']}: " + ("too hot" if sick else "healthy"))
sys.exit(int(sick))
"""
# Stands in for a tool: notes its words, and makes the folder that --out names, if it is to make one.
NOTES_WORDS = """\
import json, sys
from pathlib import Path
with open("words.txt", "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if "convert" in sys.argv[0]:
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "config.json").touch()
"""


@dataclass(frozen=True)
class Over:
    """A job that has ended. starts: (restart, node, rank) of each rank that was started."""

    job: dict[str, str]
    log: str
    folder: Path

    @property
    def starts(self) -> list[tuple[str, ...]]:
        file = self.folder / "starts.txt"
        return sorted(tuple(line.split()) for line in file.read_text().splitlines()) if file.exists() else []

    @property
    def state(self) -> tuple[str, str, str]:
        return self.job["JobState"], self.job["ExitCode"], self.job["Restarts"]


@pytest.fixture(scope="module")
def over(
    slurm: MiniSlurm, submit_folder: Path, run_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Over]:
    """Return all jobs of this file, which run at the same time."""
    shutil.copy(REPOSITORY / "tests/support/slurm/stub_trainer.py", submit_folder / "pretrain/train.py")
    (submit_folder / "tools/check_node.py").write_text(SICK_NODE)
    for tool in ("convert_to_hf", "evaluate"):
        (submit_folder / f"tools/{tool}.py").write_text(NOTES_WORDS)
    out = tmp_path_factory.mktemp("decisions")
    jobs: dict[str, str] = {}

    def start(name: str, *options: str, **variables: str) -> None:
        given = words(run_file, {"out": str(out), "name": name})
        jobs[name] = submit(slurm, submit_folder, given, *options, log=name, **variables)

    def begun(name: str, restart: int = 0) -> None:
        starts = out / name / "starts.txt"
        slurm.wait_for(
            lambda: starts.exists() and f"\n{restart} " in f"\n{starts.read_text()}", f"start {restart} of {name}"
        )

    start("crashes", *ONE_NODE)
    start("preempted-for-ever", *ONE_NODE, MAX_RESTARTS="1")
    start("refused", *TWO_NODES)
    start("diverges", *ONE_NODE)
    start("quick-needs-another-node", *ONE_NODE)
    start("cancelled", *ONE_NODE)
    (out / "forbidden").mkdir()
    (out / "forbidden/STOP").touch()
    start("forbidden", *ONE_NODE)
    start("limited", *ONE_NODE, "--time=2", "--signal=B:USR1@30", MAX_RESTARTS="1")
    jobs["chained-first"], jobs["chained-second"], jobs["chained-third"] = (
        submit(
            slurm,
            submit_folder,
            words(run_file, {"out": str(out), "name": "chained", "steps": 8}),
            *(*ONE_NODE, "--job-name=chained", "--dependency=singleton"),
            log=f"chained-{place}",
            MAX_RESTARTS="0",
        )
        for place in ("first", "second", "third")
    )
    listing = submit_folder / "a list.txt"
    lines = [f"'{run_file}' --set 'out={out}' --set name={name}" for name in ("quick-1", "waits-2")]
    listing.write_text("# two runs\n" + "\n".join(lines) + "\n")
    array = submit(slurm, submit_folder, [listing], *ONE_NODE, "--array=1-2", script="sweep", log="array-%a")

    checkpoints = out / "a run/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_00000008\n")
    evaluation = [checkpoints / "latest", "--tasks", "one,two", "--out", "my scores"]
    for name in ("evaluation", "evaluation-again"):
        before = [f"--dependency=afterok:{jobs['evaluation']}"] if name == "evaluation-again" else []
        jobs[name] = submit(
            slurm,
            submit_folder,
            evaluation,
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            *before,
            script="evaluate",
            log=name,
        )

    for restart in range(2):
        begun("preempted-for-ever", restart)
        slurm.run("scancel", "--batch", "--signal=USR1", jobs["preempted-for-ever"])
    begun("chained")
    slurm.run("scancel", "--batch", "--signal=USR1", jobs["chained-first"])
    begun("cancelled")
    slurm.run("scancel", jobs["cancelled"])
    begun("waits-2")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_2")
    begun("waits-2", restart=1)
    slurm.run("scancel", f"{array}_2")
    for name, task in (("quick-1", 1), ("waits-2", 2)):
        jobs[name] = f"{array}_{task}"
        (submit_folder / f"array-{task}.txt").rename(submit_folder / f"{name}.txt")
    return {
        name: Over(slurm.wait_over(job), (submit_folder / f"{name}.txt").read_text(), out / name)
        for name, job in jobs.items()
    }


def test_a_run_that_crashes_without_progress_is_tried_three_times(over: dict[str, Over]) -> None:
    job = over["crashes"]
    assert job.state == ("FAILED", "1:0", "2"), job.log
    assert [start[0] for start in job.starts] == ["0", "1", "2"]
    assert "ended first, with code 1: Segmentation of rank 0" in job.log
    assert "not requeued: 3 starts ended so without a new checkpoint" in job.log


def test_a_run_that_diverged_is_not_requeued(over: dict[str, Over]) -> None:
    job = over["diverges"]
    assert job.state == ("FAILED", "4:0", "0"), job.log
    assert "the loss is not finite" in job.log


def test_a_refusal_of_the_ranks_is_not_requeued_though_srun_reports_another_code(over: dict[str, Over]) -> None:
    job = over["refused"]
    assert job.state == ("FAILED", "2:0", "0"), job.log
    assert "error: there is no token shard in data/none" in job.log


def test_restarts_are_capped(over: dict[str, Over]) -> None:
    job = over["preempted-for-ever"]
    assert job.state == ("FAILED", "3:0", "1"), job.log
    assert "not requeued: it has been restarted 1 times (MAX_RESTARTS)" in job.log


def test_ahead_of_a_limit_that_slurm_enforces_the_job_goes_back_into_the_queue(over: dict[str, Over]) -> None:
    job = over["limited"]
    assert [start[0] for start in job.starts] == ["0", "1"]
    assert job.log.count("told to stop") == 2, job.log
    assert job.state == ("FAILED", "3:0", "1"), job.log  # by the cap: no limit ended it (TIMEOUT)


def test_jobs_of_a_chain_continue_one_after_the_other_until_the_run_is_finished(over: dict[str, Over]) -> None:
    first, second, third = (over[f"chained-{place}"] for place in ("first", "second", "third"))
    assert first.state == ("FAILED", "3:0", "0"), first.log
    assert second.state == ("COMPLETED", "0:0", "0"), second.log
    assert third.state == ("COMPLETED", "0:0", "0"), third.log
    assert len((first.folder.parent / "chained/starts.txt").read_text().splitlines()) == 2
    assert "nothing to do" in third.log


def test_a_job_whose_node_fails_the_check_continues_without_it(over: dict[str, Over]) -> None:
    job = over["quick-needs-another-node"]
    assert job.state == ("COMPLETED", "0:0", "1"), job.log
    sick = job.job["ExcNodeList"]
    [healthy] = set(NODES) - {sick}
    assert job.starts == [("1", healthy, "0")]
    for said in (f"{sick}: too hot", f"failed the health check: {sick}", f"excluded: {sick}", f"{healthy}: healthy"):
        assert said in job.log


def test_a_job_that_its_user_cancelled_stays_cancelled(over: dict[str, Over]) -> None:
    job = over["cancelled"]
    assert (job.job["JobState"], job.job["Restarts"]) == ("CANCELLED", "0"), job.log
    assert status(job.folder)["status"] == "preempted"


def test_nothing_starts_while_the_file_STOP_exists(over: dict[str, Over]) -> None:
    job = over["forbidden"]
    assert job.state == ("COMPLETED", "0:0", "0"), job.log
    assert "nothing to do" in job.log
    assert job.starts == []
    assert [path.name for path in job.folder.iterdir()] == ["STOP"]


def test_each_task_of_an_array_is_a_run_that_is_requeued_by_itself(over: dict[str, Over]) -> None:
    assert over["quick-1"].state == ("COMPLETED", "0:0", "0"), over["quick-1"].log
    assert [start[0] for start in over["quick-1"].starts] == ["0"]
    assert over["waits-2"].job["Restarts"] == "1", over["waits-2"].log
    assert [start[0] for start in over["waits-2"].starts] == ["0", "1"]


def test_a_checkpoint_is_exported_once_and_evaluated(over: dict[str, Over], submit_folder: Path) -> None:
    for name in ("evaluation", "evaluation-again"):
        assert over[name].state == ("COMPLETED", "0:0", "0"), over[name].log
    run = over["crashes"].folder.parent / "a run"
    model = str(run / "hf/step_00000008")
    evaluate = ["evaluate.py", "--model", model, "--tasks", "one,two", "--out", "my scores"]
    convert = ["convert_to_hf.py", "--checkpoint", str(run / "checkpoints/step_00000008"), "--out", model]
    said = [json.loads(line) for line in (submit_folder / "words.txt").read_text().splitlines()]
    assert said == [convert, evaluate, evaluate]
