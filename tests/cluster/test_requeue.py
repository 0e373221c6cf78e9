"""The decision of a job by what its ranks left, and what it keeps before they start. No Slurm is needed here."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pretrain.cluster.code_snapshot import RUN_FILE
from pretrain.cluster.requeue import MAX_FAULTS, RequeueDecision, decide
from pretrain.cluster.slurm_attempts import Attempts, Job
from pretrain.cluster.slurm_prepare import prepare, reason_not_to_start, words_of
from pretrain.config.schema import load_config
from pretrain.errors import UserError


def started(run: Path, restart: int = 0) -> Attempts:
    attempts = Attempts(run, Job("17", restart, "n[1-2]"))
    attempts.begin()
    return attempts


def ended(
    attempts: Attempts, status: dict | None = None, ranks: dict[str, int] | None = None, health: dict | None = None
) -> None:
    """Write the files that train.py and slurm/task.sh leave."""
    if status:
        (attempts.run / "status.json").write_text(json.dumps({"step": 1, "reason": "why", **status}))
    for kind, codes in (("ranks", ranks), ("health", health)):
        for task, code in (codes or {}).items():
            (attempts.folder / str(attempts.job.restart) / kind / task).write_text(f"{code}\n")


def judged(attempts: Attempts, code: int = 143, told: bool = False, nodes: int = 2, cap: int = 100) -> RequeueDecision:
    return decide(attempts, code, told, nodes, cap)


@pytest.mark.parametrize(
    ("status", "ranks", "code", "told", "requeue", "exit_code"),
    [
        ({"status": "finished"}, {}, 0, False, False, 0),
        ({"status": "finished"}, {"n2.1": 134}, 134, False, False, 0),  # a crash on the way out
        ({"status": "stopped"}, {}, 0, True, False, 0),
        ({"status": "preempted"}, {}, 0, True, True, 3),
        ({"status": "preempted"}, {"n2.1": 1}, 1, True, True, 3),  # a crash on the way out
        ({"status": "preempted"}, {"n1.0": 137, "n2.1": 137}, 137, False, True, 3),  # Slurm has lost its patience
        (None, {"n1.0": 2, "n2.1": 143}, 143, False, False, 2),
        ({"status": "failed", "exit_code": 2}, {}, 143, False, False, 2),
        ({"status": "failed", "exit_code": 4}, {"n1.0": 4, "n2.1": 3}, 4, False, False, 4),
        ({"status": "failed", "exit_code": 3}, {"n1.0": 3}, 3, False, True, 3),
        ({"status": "failed"}, {"n1.0": 1}, 143, False, True, 1),  # an older trainer
        ({"status": "running"}, {"n2.1": 137}, 137, False, True, 3),  # killed by the machine
        ({"status": "running"}, {}, 137, False, True, 3),  # every task lost
        ({"status": "running"}, {"n2.1": 134, "n1.0": 137}, 134, False, True, 3),  # NCCL has aborted a rank
        (None, {"n1.0": 138, "n2.1": 138}, 138, True, True, 3),  # signalled before anybody listened
        (None, {}, 0, True, True, 3),  # signalled before the ranks started
        ({"status": "running"}, {}, 0, False, False, 1),
    ],
)
def test_verdicts(
    tmp_path: Path, status: dict | None, ranks: dict, code: int, told: bool, requeue: bool, exit_code: int
) -> None:
    attempts = started(tmp_path)
    ended(attempts, status, ranks)
    found = judged(attempts, code, told)
    assert (found.requeue, found.code) == (requeue, exit_code), found


def test_the_status_of_an_earlier_start_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"status": "stopped", "step": 3, "reason": "the file STOP"}))
    attempts = started(tmp_path)
    ended(attempts, ranks={"n1.0": 2})
    assert judged(attempts).code == 2


def test_the_reason_names_the_rank_that_failed_first_its_node_and_its_last_message(tmp_path: Path) -> None:
    attempts = started(tmp_path)
    ended(attempts, ranks={"node-7.example.5": 1, "n1.0": 3})
    os.utime(tmp_path / "slurm/17/0/ranks/node-7.example.5", (1, 1))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/slurm_17_rank_5.txt").write_text("one\nCUDA error: an illegal memory access\n")
    reason = judged(attempts).reason
    assert "rank 5 on node-7.example ended first, with code 1: CUDA error: an illegal memory access" in reason
    assert "slurm_17_rank_5.txt" in reason


def test_faults_that_leave_no_newer_checkpoint_end_the_job(tmp_path: Path) -> None:
    for restart in range(MAX_FAULTS):
        attempts = started(tmp_path, restart)
        ended(attempts, {"status": "failed", "exit_code": 3})
        found = judged(attempts)
        assert found.requeue == (restart < MAX_FAULTS - 1)
    assert found.code == 3
    assert "without a new checkpoint" in found.reason


def test_a_stop_that_only_the_end_of_another_rank_has_caused_is_a_fault(tmp_path: Path) -> None:
    """srun sends SIGTERM to the other ranks then, perhaps before they have met the one that failed."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/slurm_17_rank_1.txt").write_text("error: rank 1 could not meet the others\n")
    for restart in range(MAX_FAULTS):
        attempts = started(tmp_path, restart)
        ended(attempts, {"status": "preempted", "reason": "stopped by SIGTERM"}, {"n2.1": 3})
        found = judged(attempts)
        assert "rank 1 on n2 ended first, with code 3: error: rank 1 could not meet the others" in found.reason
        assert found.requeue == (restart < MAX_FAULTS - 1)


def test_faults_with_progress_between_them_and_preemptions_do_not(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for restart in range(3 * MAX_FAULTS):
        attempts = started(tmp_path, restart)
        (tmp_path / "checkpoints/latest").write_text(f"step_{restart // 2:08d}\n")
        ended(
            attempts, {"status": "preempted" if restart % 3 == 0 else "failed"}, {} if restart % 3 == 0 else {"n1.0": 1}
        )
        assert judged(attempts).requeue


def test_restarts_are_capped(tmp_path: Path) -> None:
    for restart, requeue in ((1, True), (2, False)):
        attempts = started(tmp_path, restart)
        ended(attempts, {"status": "preempted"})
        found = judged(attempts, code=0, cap=2)
        assert found.requeue == requeue
    assert found.code == 3
    assert "restarted 2 times (MAX_RESTARTS)" in found.reason


@pytest.mark.parametrize(
    ("failed", "nodes", "exclude"),
    [({"n2.1": 1}, 2, ("n2",)), ({"n1.0": 1}, 1, ("n1",)), ({"n1.0": 1, "n2.1": 1}, 2, ())],
)
def test_an_unhealthy_node_is_excluded_unless_all_are(
    tmp_path: Path, failed: dict, nodes: int, exclude: tuple[str, ...]
) -> None:
    attempts = started(tmp_path)
    ended(attempts, health=failed)
    found = judged(attempts, 1, nodes=nodes)
    assert (found.requeue, found.exclude) == (True, exclude)
    assert "n1" in found.reason or "n2" in found.reason


def test_a_node_whose_check_was_stopped_is_not_excluded(tmp_path: Path) -> None:
    attempts = started(tmp_path)
    ended(attempts, health={"n1.0": 128 + signal.SIGUSR1})
    found = judged(attempts, 1, told=True)
    assert (found.requeue, found.exclude, found.outcome) == (True, (), "preempted")


def test_a_run_that_is_finished_or_stopped_is_not_started(run_file: Path, tmp_path: Path) -> None:
    config = load_config(run_file, [f"out={tmp_path}", "name=run", "steps=8"])
    assert reason_not_to_start(config) is None
    config.folder.mkdir()
    (config.folder / "status.json").write_text(json.dumps({"status": "finished", "step": 8}))
    assert "finished at step 8" in (reason_not_to_start(config) or "")
    longer = load_config(run_file, [f"out={tmp_path}", "name=run", "steps=9"])
    assert reason_not_to_start(longer) is None
    (config.folder / "STOP").touch()
    assert "STOP exists" in (reason_not_to_start(longer) or "")


def test_the_snapshot_holds_the_code_and_the_run_but_no_secret(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    config = load_config(run_file, [f"out={tmp_path}", "name=run"])
    environment = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_JOB_PARTITION": "gpu", "SLURM_JWT": "sesame-open"}
    snapshot = prepare(config, Job("17", 0, "n1"), environment)
    assert snapshot == tmp_path / "run/code/17"
    frozen = load_config(snapshot / RUN_FILE)
    assert isinstance(frozen.deepspeed, dict)
    assert frozen.model_copy(update={"deepspeed": config.deepspeed}) == config
    here = Path(__file__).resolve().parents[2]
    for name in ("pretrain/train.py", "tools/slurm_job.py", "slurm/job.sh", "ds_configs/zero3_fp32.json"):
        assert (snapshot / name).read_bytes() == (here / name).read_bytes()
    record = json.loads((snapshot / "snapshot.json").read_text())
    assert record["job"] == {"job_id": "17", "job_partition": "gpu"}
    assert record["packages"]["torch"]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert not [path for path in written if b"sesame-open" in path.read_bytes()]


def test_a_requeued_job_keeps_its_snapshot_and_a_new_job_of_that_number_does_not(
    run_file: Path, tmp_path: Path
) -> None:
    config = load_config(run_file, [f"out={tmp_path}", "name=run"])
    snapshot = prepare(config, Job("17", 0, "n1"), {})
    (snapshot / "mark").touch()
    assert prepare(config, Job("17", 1, "n1"), {}) == snapshot
    assert (snapshot / "mark").exists()
    assert [attempt.restart for attempt in Attempts(config.folder, Job("17", 1, "")).all] == [0, 1]
    assert prepare(config, Job("17", 0, "n1"), {}) == snapshot
    assert not (snapshot / "mark").exists()
    assert len(list((config.folder / "code").glob("17.before_*/mark"))) == 1
    assert len(Attempts(config.folder, Job("17", 0, "")).all) == 1


def test_a_list_of_runs_is_read_as_a_shell_reads_words_and_runs_nothing(tmp_path: Path) -> None:
    listing = tmp_path / "sweep.txt"
    listing.write_text(
        "# learning rates\n\n'my configs/a.yaml' --set \"name=a b\"\nb.yaml --set 'out=$(touch x); `y`'\n"
    )
    assert words_of(listing, 1) == ["my configs/a.yaml", "--set", "name=a b"]
    assert words_of(listing, 2) == ["b.yaml", "--set", "out=$(touch x); `y`"]
    for number in (0, 3):
        with pytest.raises(UserError, match=r"lists 2 runs .* --array=1-2"):
            words_of(listing, number)
    listing.write_text("a.yaml --set 'name=a\n")
    with pytest.raises(UserError, match="run 1: No closing quotation"):
        words_of(listing, 1)
    with pytest.raises(UserError, match="cannot read the list"):
        words_of(tmp_path / "none.txt", 1)


def test_outside_of_a_job_there_is_nothing_to_decide() -> None:
    with pytest.raises(UserError, match="no Slurm job"):
        Job.from_environment({})
