"""NCCL groups on the fake device: real process groups whose only backend is for CUDA, and sends by gloo."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

TIMEOUT = timedelta(minutes=10)  # NCCL's


class ProcessGroupNCCL(dist.ProcessGroup):
    """A process group that takes the place of NCCL's backend where torch makes groups."""

    class Options(SimpleNamespace):
        """The settings that torch gives before it makes a group."""

        _timeout: timedelta = TIMEOUT

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the only one that torch gives to Python's classes
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=options._timeout)
        carrier = dist.ProcessGroup(store, rank, size)
        carrier._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        torch.ops.fakecuda.register_nccl(self.boxed(), carrier.boxed())


def install() -> None:
    """Let torch find NCCL, and gloo for CPU tensors only. The library of the device must be loaded."""
    replacements: dict[str, Any] = {
        "ProcessGroupNCCL": ProcessGroupNCCL,
        "_NCCL_AVAILABLE": True,
        "default_pg_nccl_timeout": TIMEOUT,
    }
    for name, replacement in replacements.items():
        setattr(c10d, name, replacement)
    # A torch with CUDA takes its tensors to gloo through the host. That is a wait that the product must not ask for.
    dist.Backend.backend_capability[dist.Backend.GLOO] = ["cpu"]
