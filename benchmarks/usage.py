"""Measure a command: the CPU time and the memory of its whole process tree, orphans included. Linux only."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_SAMPLED_EVERY_S = 0.05


@dataclass(frozen=True)
class Usage:
    """The cost of a command.

    Attributes:
        cpu_s: User and system time of all processes together.
        wall_s: Seconds from its start to the end of its last process.
        peak_bytes: The most anonymous and shared memory that the processes held together, among samples taken every 50 ms.
            A page that n processes share counts 1/n in each. Pages of mapped files, which the kernel can drop, do not count.
        output: Its standard output.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run `command` to its end and wait for the processes it leaves behind. Raise RuntimeError if it fails."""
    # Pools leave servers behind that have no parent when the command ends. They become our children, so their time counts.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
    others = set(_children(os.getpid()))
    before, began = _cpu_of_children(), time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    peak = [0]
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, ended, others))
    watch.start()
    output, errors = process.communicate()
    while adopted := set(_children(os.getpid())) - others:
        for child in adopted:
            os.waitpid(int(child), 0)
    wall = time.perf_counter() - began
    ended.set()
    watch.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{output}{errors}")
    return Usage(_cpu_of_children() - before, wall, peak[0], output)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(peak: list[int], ended: threading.Event, others: set[str]) -> None:
    while not ended.wait(_SAMPLED_EVERY_S):
        measured = (
            pid for child in _children(os.getpid()) if child not in others for pid in (child, *_descendants(child))
        )
        peak[0] = max(peak[0], sum(map(_own_bytes, measured)))


def _descendants(pid: str) -> Iterator[str]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _children(pid: int | str) -> list[str]:
    found = []
    with suppress(OSError):  # the process or thread has ended meanwhile
        for children in list(Path(f"/proc/{pid}/task").glob("*/children")):
            found += children.read_text(encoding="utf-8").split()
    return found


def _own_bytes(pid: str) -> int:
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as rollup:
        return 1024 * sum(int(line.split()[1]) for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return 0
