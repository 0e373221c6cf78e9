"""The memory that a call takes beyond what was allocated before it, to the byte, from torch's allocators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak of the memory, in bytes, that torch allocated during `call()` and had not yet freed.

    Temporary buffers count. With a GPU it is the GPU's memory. Without one it is the CPU's: every allocation and release is
    taken from torch's profiler, gloo's buffers among them. This is slow; do not time the same call.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not (events := _events(call)):
        return 0
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in events) - before)


def kept_extra_bytes(call: Callable[[], object]) -> int:
    """Return the memory, in bytes, that is allocated when `call()` has returned, its result alive, and was not before.

    It is taken from the same sources as `peak_extra_bytes`.
    """
    alive: list[object] = []
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        alive.append(call())
        return torch.cuda.memory_allocated() - before
    return sum(event["args"]["Bytes"] for event in _events(lambda: alive.append(call())))


def _events(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Return every allocation and release of the CPU's memory during `call()`, as the profiler writes them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
