"""Checks that this node can compile what a run compiles: torch.compile calls a compiler while the run starts.

Without one it fails after the model is built, on the nodes that lack it only, with a traceback of hundreds of lines.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.optimizers import OPTIMIZERS


def check_compiler(config: Config) -> None:
    """Raise UserError if the run compiles code and this node lacks what that takes. Needs no process group."""
    if OPTIMIZERS[config.optim.name].compiles and torch.cuda.is_available():
        _require(f"optim.name: {config.optim.name}", missing_for_gpu(), "take optim.name: adamw")
    if config.compile == "layers":
        missing = missing_for_gpu() if torch.cuda.is_available() else missing_for_cpu()
        _require("compile: layers", missing, "set compile: off")


def kind_of_attention(config: Config) -> str:
    """Return how attention keeps to documents on this node, in a word: `blocks` by flex_attention, `mask`, or `causal`."""
    if not config.data.document_attention:
        return "causal"
    return "blocks" if torch.cuda.is_available() and not missing_for_gpu() else "mask"


def missing_for_gpu() -> list[str]:
    """Return what torch.compile lacks here to compile for a GPU: triton's launchers are C code."""
    triton = [] if find_spec("triton") else ["the package triton"]
    return [*triton, *_missing("CC", ("gcc", "clang"), "a C compiler (gcc or clang on PATH, or CC)")]


def missing_for_cpu() -> list[str]:
    """Return what torch.compile lacks here to compile for the CPU: its kernels are C++ code."""
    return _missing("CXX", ("g++", "clang++"), "a C++ compiler (g++ or clang++ on PATH, or CXX)")


def _require(what: str, missing: list[str], instead: str) -> None:
    if missing:
        raise UserError(
            f"{what} compiles kernels on every node, and {socket.gethostname()} lacks {' and '.join(missing)}. Install "
            f"that, or {instead}."
        )


def _missing(variable: str, compilers: tuple[str, ...], what: str) -> list[str]:
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    compiler = [] if any(map(shutil.which, chosen or compilers)) else [what]
    # As triton looks for them: Debian's own scheme of folders has no headers.
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return [
        *compiler,
        *([] if headers.exists() else [f"Python's headers ({headers}, in python3-dev or python3-devel)"]),
    ]
