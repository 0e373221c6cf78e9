"""Builds the C++ part of the fake device, once for each version of torch and of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "native"
CACHE = REPOSITORY / ".fakecuda"  # ignored by git
COMPILER = "g++"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror")


def why_not() -> str | None:
    """Return a sentence that says why the device cannot be had here; None if it can."""
    if shutil.which(COMPILER) is None:
        return f"the fake CUDA device is built with {COMPILER}, which is not on PATH"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "the fake CUDA device needs a torch without CUDA, and this one has it"
    return None


def library() -> Path:
    """Return the shared library of this torch and these sources. It is built if it is not there yet.

    Raises:
        RuntimeError: the compiler fails. The message holds what it printed.
    """
    path = CACHE / f"fakecuda-{_digest()}.so"
    if path.exists():
        return path
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together build it once
        if not path.exists():
            _build(path)
    return path


def _digest() -> str:
    """Return a digest of what the library is made from."""
    digest = hashlib.sha256(f"{importlib.metadata.version('torch')} {COMPILER} {FLAGS}".encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(path: Path) -> None:
    torch = _torch()
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    parts = [path.with_suffix(f".{source.stem}.o") for source in _units()]
    _run_together(
        [COMPILER, *FLAGS, *include, "-c", str(source), "-o", str(part)]
        for source, part in zip(_units(), parts, strict=True)
    )
    half = path.with_suffix(".part")
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    _run_together([[COMPILER, "-shared", *map(str, parts), "-o", str(half), *libraries]])
    for part in parts:
        part.unlink()
    os.replace(half, path)


def _run_together(commands: Iterable[list[str]]) -> None:
    """Run commands at once. RuntimeError if one fails."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    failed = [output for process, output in zip(running, outputs, strict=True) if process.returncode]
    if failed:
        raise RuntimeError("the fake CUDA device does not compile:\n" + "\n".join(failed))


def _units() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _torch() -> Path:
    """Return torch's folder without importing it: the library must be loaded first."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
