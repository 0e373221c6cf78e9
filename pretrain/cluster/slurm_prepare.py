"""The preparation of a job before its ranks start: check that there is work, and keep the code that runs."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from pretrain.cluster.code_snapshot import take_snapshot
from pretrain.cluster.slurm_attempts import Attempts, Job
from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.resilience.stop_requests import STOP_FILE

# Slurm's variables that the job's snapshot keeps. The rest of the environment may hold secrets.
_JOB_VARIABLES = (
    "JOB_ID",
    "JOB_NAME",
    "JOB_NODELIST",
    "JOB_NUM_NODES",
    "NTASKS",
    "JOB_PARTITION",
    "JOB_ACCOUNT",
    "CLUSTER_NAME",
    "SUBMIT_DIR",
    "ARRAY_JOB_ID",
    "ARRAY_TASK_ID",
)


def reason_not_to_start(config: Config) -> str | None:
    """Return why there is nothing to do, so that chained jobs end at once. None if the job is to start."""
    run = config.folder
    if (run / STOP_FILE).exists():
        return f"{run / STOP_FILE} exists. Delete it to go on."
    status = json.loads((run / "status.json").read_bytes()) if (run / "status.json").is_file() else {}
    if status.get("status") == "finished" and status["step"] >= config.total_steps:
        return f"the run has finished at step {status['step']:,}."
    return None


def prepare(config: Config, job: Job, environment: Mapping[str, str]) -> Path:
    """Make the run folder and the job's snapshot in it, and record the start.

    Args:
        environment: the environment variables of the job.

    Returns:
        The folder of the snapshot. A requeued job gets the one that it began with.

    Raises:
        UserError: the folder cannot be written.
    """
    run = config.folder.absolute()
    snapshot = run / "code" / job.id
    try:
        if job.restart == 0:
            for kind in ("code", "slurm"):
                _move_away(run / kind / job.id)
        for folder in ("code", "logs", "slurm"):
            (run / folder).mkdir(parents=True, exist_ok=True)
        if not snapshot.exists():
            take_snapshot(snapshot, config, job_variables(environment))
        Attempts(run, job).begin()
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run}: {error.strerror or error}.") from error
    return snapshot


def job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return Slurm's variables of this job, by their names in lower case without SLURM_."""
    given = {name.lower(): environment.get(f"SLURM_{name}") for name in _JOB_VARIABLES}
    return {name: value for name, value in given.items() if value}


def words_of(listing: Path, number: int) -> list[str]:
    """Return the words of run number `number` in a sweep's list.

    Runs are counted from 1, without empty lines and lines that begin with #. Quotes and backslashes group as in a shell.
    Nothing is expanded or run.

    Raises:
        UserError: there is no such line, or its quotes are not closed.
    """
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of runs {listing}: {error}.") from error
    runs = [line for line in lines if line and not line.startswith("#")]
    if not 1 <= number <= len(runs):
        raise UserError(f"{listing} lists {len(runs)} runs and has no number {number}: submit --array=1-{len(runs)}.")
    try:
        return shlex.split(runs[number - 1])
    except ValueError as error:
        raise UserError(f"{listing}, run {number}: {error}: {runs[number - 1]}") from error


def _move_away(folder: Path) -> None:
    """Rename a folder of an older job: numbers come again on another cluster, or when Slurm is installed again."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.before_{time.strftime('%Y%m%d_%H%M%S')}"))
