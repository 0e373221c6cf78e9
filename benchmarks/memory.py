"""The peak memory of a call beyond what was allocated before it, to the byte, from torch's allocators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
    if not events:
        return 0
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in events) - before)
