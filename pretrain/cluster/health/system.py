"""Checks of a node's disk space, memory, limits and clock, for the least that a run needs."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_OPEN_FILES = 1024
_FILES_LEFT = 10_000  # a checkpoint has a few files for each rank
_SCRATCH_GB = 1.0
_MEMORY_FREE = 0.1  # the least share of all memory
_CLOCK_S = 5.0  # the largest difference; rounding and delay of a network file system stay well below it


def check_limits() -> Iterator[str]:
    """Yield a sentence if a process may open too few files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        yield f"a process may open {soft} files, fewer than {_OPEN_FILES}: raise the limit with `ulimit -n`"


def check_memory(table: Path = Path("/proc/meminfo")) -> Iterator[str]:
    """Yield a sentence if too little memory is available. table: the kernel's table, in kB."""
    lines = (line.split() for line in table.read_text(encoding="utf-8", errors="replace").splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total, available = kilobytes["MemTotal"], kilobytes["MemAvailable"]
    if available < _MEMORY_FREE * total:
        yield f"{available / 1e6:.1f} GB of {total / 1e6:.1f} GB memory are available: something else is using it"


def check_scratch(folder: Path | None = None) -> Iterator[str]:
    """Yield a sentence if a folder has too little room. folder: that of temporary files if None."""
    folder = folder or Path(tempfile.gettempdir())
    try:
        yield from _check_room(folder, _SCRATCH_GB)
    except OSError as error:
        yield f"{folder} cannot be looked at: {error.strerror}"


def check_folder(folder: Path, min_free_gb: float) -> Iterator[str]:
    """Yield what is wrong with the run folder, or with the nearest folder above it that exists: space, content, clock."""
    folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        yield from _check_room(folder, min_free_gb)
        space = os.statvfs(folder)
        if space.f_files and space.f_favail < _FILES_LEFT:  # some file systems count no files
            yield f"{folder} has room for {space.f_favail} more files, fewer than {_FILES_LEFT}"
        yield from _write_and_read(folder)
    except OSError as error:
        yield f"{folder} cannot be written: {error.strerror}"


def _write_and_read(folder: Path) -> Iterator[str]:
    content = os.urandom(1 << 16)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".check_node.") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        ahead = time.time() - os.stat(file.name).st_mtime
        if Path(file.name).read_bytes() != content:
            yield f"{folder} gave back other bytes than were written"
    if abs(ahead) > _CLOCK_S:
        yield (
            f"this node's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {folder}: "
            "synchronize it"
        )


def _check_room(folder: Path, min_free_gb: float) -> Iterator[str]:
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < min_free_gb * 1e9:
        yield f"{folder} has {free / 1e9:.2f} GB free, less than {min_free_gb:g} GB"
