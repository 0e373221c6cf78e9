"""The processes that started this rank, to notice when one of them is gone: nobody would end an orphaned run."""

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
    """Name the launcher that has started this process as a rank among others, as far as it can be seen."""
    if len(ancestors()) > 1:
        return "deepspeed"
    return next((name for sign, name in _SIGNS.items() if sign in os.environ), None)


def ancestors() -> tuple[int, ...]:
    """The process above this one, and the one above DeepSpeed's per-node launcher if it is that."""
    parent = os.getppid()
    with suppress(OSError):  # no /proc here, or the parent has just gone
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            return parent, _parent_of(parent)
    return (parent,)


def _parent_of(process: int) -> int:
    # The second field, in brackets, is a name that may hold anything.
    return int(
        Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
    )
