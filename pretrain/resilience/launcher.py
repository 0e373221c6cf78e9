"""The processes that started this rank, to notice when one of them is gone: nobody would end an orphaned run."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


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
