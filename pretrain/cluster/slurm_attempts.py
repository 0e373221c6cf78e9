"""The record that a job keeps from one start to the next, in `<run>/slurm/<job id>/`.

`attempts.json` lists its starts. `<restart>/ranks/` and `<restart>/health/` hold the exit code of each task that did not
end with 0, in a file called `<node>.<task>`, which slurm/task.sh writes. srun's own exit code is of no use: it can be that
of a task that srun has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pretrain.errors import UserError
from pretrain.files import write_json

FAULT = "fault"
TaskKind: TypeAlias = Literal["ranks", "health"]  # the ranks of a start, or the health checks of its nodes


@dataclass(frozen=True)
class Job:
    """A Slurm job.

    Attributes:
        restart: how often Slurm has requeued it.
        nodes: its nodes, in Slurm's notation.
    """

    id: str
    restart: int
    nodes: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Return the job that the variables in `environment` name. UserError outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError("this is no Slurm job (SLURM_JOB_ID is not set): sbatch slurm/train.sbatch starts one.")
        restart, nodes = environment.get("SLURM_RESTART_COUNT", "0"), environment.get("SLURM_JOB_NODELIST", "")
        return cls(environment["SLURM_JOB_ID"], int(restart), nodes)


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        checkpoint: the run's newest when it began.
        status_written_ns: the time of the last change to status.json before it began. A later one is by this start.
        outcome: how it ended. None if nothing was left to record it, as when the node of the batch script dies.
    """

    restart: int
    nodes: str
    checkpoint: str | None
    status_written_ns: int | None
    outcome: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Task:
    """A task that did not end with 0."""

    node: str
    number: int
    code: int


class Attempts:
    """The starts of a job, in a run folder."""

    def __init__(self, run: Path, job: Job) -> None:
        """Read the record of `job` in the run folder `run`."""
        self.run, self.job = run, job
        self.folder = run / "slurm" / job.id
        self._file = self.folder / "attempts.json"
        self.all = [Attempt(**entry) for entry in json.loads(self._file.read_bytes())] if self._file.exists() else []

    def begin(self) -> None:
        """Record this start, before the run writes anything."""
        for kind in ("ranks", "health"):
            (self._failures / kind).mkdir(parents=True, exist_ok=True)
        written = self._status.stat().st_mtime_ns if self._status.exists() else None
        self.all.append(Attempt(self.job.restart, self.job.nodes, self.newest_checkpoint(), written))
        self._write()

    def end(self, outcome: str, reason: str) -> None:
        """Record how this start ended."""
        self.all[-1] = Attempt(**{**asdict(self.all[-1]), "outcome": outcome, "reason": reason})
        self._write()

    def faults_without_progress(self) -> int:
        """Return how many starts have ended in a fault and left no newer checkpoint than they had found."""
        now = self.newest_checkpoint()
        return sum(attempt.outcome == FAULT and attempt.checkpoint == now for attempt in self.all)

    def newest_checkpoint(self) -> str | None:
        """Return the name of the run's newest checkpoint, None if it has none."""
        latest = self.run / "checkpoints/latest"
        return latest.read_text(encoding="utf-8").strip() if latest.is_file() else None

    def status(self) -> dict[str, Any]:
        """Return the content of status.json if this start has written it, else {}."""
        if not self._status.exists() or self._status.stat().st_mtime_ns == self.all[-1].status_written_ns:
            return {}
        return json.loads(self._status.read_bytes())

    def failed_tasks(self, kind: TaskKind) -> list[Task]:
        """Return the tasks of this start that failed, in the order in which they failed."""
        files = sorted((self._failures / kind).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [Task(path.stem, int(path.suffix[1:]), int(path.read_text(encoding="utf-8"))) for path in files]

    def rank_log(self, rank: int) -> Path:
        """Return the log of a rank."""
        return self.run / "logs" / f"slurm_{self.job.id}_rank_{rank}.txt"

    @property
    def _status(self) -> Path:
        return self.run / "status.json"

    @property
    def _failures(self) -> Path:
        return self.folder / str(self.job.restart)

    def _write(self) -> None:
        write_json(self._file, [asdict(attempt) for attempt in self.all])
