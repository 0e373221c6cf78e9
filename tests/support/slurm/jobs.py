"""How these tests submit jobs, and what the jobs leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.runs import ENVIRONMENT, arguments, losses
from tests.support.slurm.mini_slurm import MiniSlurm

# One rank on each node. A job's limits and its GPUs, which there are none of here, are overridden as a user would.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
ONE_NODE = ("--nodes=1", *TWO_NODES[1:])


def submit(
    slurm: MiniSlurm,
    folder: Path,
    words: list[str | Path],
    *options: str,
    script: str = "train",
    log: str = "job",
    **variables: str,
) -> str:
    """sbatch slurm/<script>.sbatch with `words`; its log is <folder>/<log>.txt."""
    command = [*options, f"--output={log}.txt", f"slurm/{script}.sbatch", *words]
    # Runs of a megabyte may be tested where there is little room.
    path = {"MIN_FREE_GB": "0.1", "PYTHON": sys.executable, "PATH": f"{ENVIRONMENT['PATH']}:/usr/sbin"}
    return slurm.submit(*command, cwd=folder, **ENVIRONMENT | path | variables)


def words(run_file: Path, settings: dict) -> list[str | Path]:
    """The command line of train.sbatch."""
    return arguments(run_file, settings)[1:]


def preempt(slurm: MiniSlurm, job: str, ready: Callable[[], bool]) -> None:
    """What Slurm does ahead of the time limit with --signal=B:USR1, once `ready`."""
    slurm.wait_for(lambda: ready() or slurm.over(job), f"the moment to preempt job {job}")
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def trained(folder: Path, steps: int) -> Callable[[], bool]:
    """Whether the run in `folder` has done at least `steps` steps."""
    return lambda: max(losses(folder), default=0) >= steps
