"""Puts the fake device into this process. It must come before the first import of torch, which then finds CUDA."""

from __future__ import annotations

import ctypes
import os
import sys

from tests.fakecuda import build


def install(devices: int | None = None) -> None:
    """Make this process one with CUDA devices.

    Args:
        devices: how many there are. None: one for each rank of this node, by LOCAL_WORLD_SIZE.

    Raises:
        RuntimeError: torch is imported already, or the library does not compile.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake CUDA device must be installed before torch is imported")
    os.environ["FAKECUDA_DEVICES"] = str(devices or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed looks for CUDA itself
    ctypes.CDLL(str(build.library()), ctypes.RTLD_GLOBAL)

    import torch

    from tests.fakecuda import device, nccl

    device.install()
    nccl.install()
    torch.compiler.set_stance("force_eager")  # there is no Triton that could compile for this device
