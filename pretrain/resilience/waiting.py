"""Distinguishes a rank that waits for others or for its GPU from one at fault, by its stacks and its collectives.

On a GPU the host runs ahead: collectives are only enqueued, and the host blocks later, where it reads a number from the
device or synchronizes. So a rank that is blocked there is not at fault by itself. What it has enqueued and completed, which
torch's flight recorder counts for each process group, shows which rank the others wait for.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

_COLLECTIVES = "torch/distributed/"
_BACKWARD = "torch/autograd/"  # the main thread is there while hooks run in the thread of a GPU
# Where the host calls into the GPU's library, or into a collective's handle: a part of the file's path, and the function.
_BLOCKING = (
    ("torch/cuda/", "synchronize"),
    ("deepspeed/comm/", None),
    ("deepspeed/accelerator/", None),
    ("deepspeed/utils/timer.py", None),
    ("deepspeed/runtime/", None),
    ("pretrain/engine/", None),  # the gate reads the loss and the norm
)


@dataclass(frozen=True)
class Progress:
    """The collectives of one process group that this rank has enqueued, started and completed, by their numbers.

    Attributes:
        enqueued, started, completed: the number of the last one. -1: none, or not recorded (NCCL records starts only under
            TORCH_NCCL_ENABLE_TIMING=1, gloo never).
        last: the name of the last one that was enqueued.
    """

    enqueued: int
    started: int
    completed: int
    last: str

    def __str__(self) -> str:
        """Return the progress in words."""
        done = "completed" if self.completed >= self.enqueued else f"not completed, {self.completed} is"
        return f"{self.last} number {self.enqueued} {done}"

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.enqueued, self.started, self.completed


def waits_for_others() -> bool:
    """Return whether the main thread is within a collective operation, or blocked where the host waits for its GPU."""
    main = threading.main_thread().ident
    frames = sys._current_frames()
    if main is None:
        return False
    frame = frames.pop(main)
    if _waits(frame):
        return True
    return _BACKWARD in _path(frame) and any(map(_waits, frames.values()))


def collective_progress() -> dict[str, Progress]:
    """Return this rank's progress in each process group that it has used lately, by a name that all ranks share."""
    found: dict[str, Progress] = {}
    for record in _records():
        names = {entry["pg_id"]: entry for entry in record["entries"] if not entry["is_p2p"]}
        for number, entry in names.items():
            status, (name, description) = record["pg_status"][str(number)], entry["process_group"]
            found[f"{description} ({name})"] = Progress(
                int(status["last_enqueued_collective"]),
                int(status["last_started_collective"]),
                int(status["last_completed_collective"]),
                entry["profiling_name"],
            )
    return found


def furthest_behind(progress: dict[int, dict[str, Progress]]) -> list[int]:
    """Return the ranks that have enqueued, started or completed fewer collectives than others of the same group.

    Args:
        progress: the progress of each rank, by its number.

    Returns:
        The ranks in order; empty if none is behind. Of several groups the first counts in which ranks differ.
    """
    for group in sorted({name for of_rank in progress.values() for name in of_rank}):
        numbers = {rank: of_rank[group].numbers for rank, of_rank in progress.items() if group in of_rank}
        if len(set(numbers.values())) > 1:
            least = min(numbers.values())
            return sorted(rank for rank, those in numbers.items() if those == least)
    return []


def _records() -> list[dict[str, Any]]:
    """Return what torch's flight recorders hold: that of NCCL, and that of gloo. None of them in a build without it."""
    from torch._C import _distributed_c10d

    dumps = [getattr(_distributed_c10d, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")]
    # With the collectives, also those that are completed.
    records = [json.loads(dump(True, False)) for dump in dumps if dump is not None]
    return [record for record in records if record.get("entries")]


def _waits(frame: FrameType) -> bool:
    """Return whether a thread whose innermost call is `frame` waits there."""
    path, function = _path(frame), frame.f_code.co_name
    if any(part in path and name in (None, function) for part, name in _BLOCKING):
        return True
    callers = [frame, frame.f_back, frame.f_back and frame.f_back.f_back]
    return any(_COLLECTIVES in _path(caller) for caller in callers if caller is not None)


def _path(frame: FrameType) -> str:
    return frame.f_code.co_filename
