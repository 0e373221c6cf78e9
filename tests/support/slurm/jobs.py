"""Submit jobs to the tests' Slurm, preempt them, and read their results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.runs import ENVIRONMENT, arguments, losses
from tests.support.slurm.mini_slurm import MiniSlurm

# One rank on each node. A job's limits and its GPUs (there are none here) are overridden as a user would.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
ONE_NODE = ("--nodes=1", *TWO_NODES[1:])


def submit(
    slurm: MiniSlurm,
    folder: Path,
    words: Sequence[str | Path],
    *options: str,
    script: str = "train",
    log: str = "job",
    **variables: str,
) -> str:
    """Submit slurm/<script>.sbatch with `words`; its log is <folder>/<log>.txt."""
    command = [*options, f"--output={log}.txt", f"slurm/{script}.sbatch", *words]
    # Runs of a megabyte may be tested on a small disk.
    path = {"MIN_FREE_GB": "0.1", "PYTHON": sys.executable, "PATH": f"{ENVIRONMENT['PATH']}:/usr/sbin"}
    return slurm.submit(*command, cwd=folder, **ENVIRONMENT | path | variables)


def words(run_file: Path, settings: dict) -> list[str]:
    """Return the command line of train.sbatch."""
    return arguments(run_file, settings)[1:]


def preempt(slurm: MiniSlurm, job: str, ready: Callable[[], bool]) -> None:
    """Signal the job as Slurm does ahead of the time limit with --signal=B:USR1, once `ready` holds."""
    slurm.wait_for(lambda: ready() or slurm.over(job), f"the moment to preempt job {job}")
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def trained(folder: Path, steps: int) -> Callable[[], bool]:
    """Return a condition: the run in `folder` has done at least `steps` steps."""
    return lambda: max(losses(folder), default=0) >= steps
