"""The processes that started this rank, to notice when one of them ends: nothing else would end an orphaned run."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_SIGNS = {  # variables that a launcher sets for its ranks
    "TORCHELASTIC_RUN_ID": "torchrun",
    "SLURM_STEP_ID": "srun",
    "OMPI_COMM_WORLD_RANK": "mpirun",
    "PMI_RANK": "mpirun",
}


def launcher() -> str | None:
    """Return the name of the launcher that has started this process as one of several ranks; None if there is no sign of one."""
    if len(ancestors()) > 1:
        return "deepspeed"
    return next((name for sign, name in _SIGNS.items() if sign in os.environ), None)


def ancestors() -> tuple[int, ...]:
    """Return the parent process, and the parent of that one where it is DeepSpeed's per-node launcher."""
    parent = os.getppid()
    with suppress(OSError):  # no /proc here, or the parent has just gone
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent, _parent_of(parent)
    return (parent,)


def _parent_of(process: int) -> int:
    status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    after_name = status.rpartition(")")[2]  # the name, in brackets, may hold anything
    return int(after_name.split()[1])
