"""Kernels that give the same bits for the same input, on a GPU too.

On a CPU they do by themselves. On a GPU the fast backward of attention, of embeddings and others add with atomics, in whatever
order threads come, and cuBLAS and NCCL may choose an algorithm by what is free. Measured cost: none yet, for want of a GPU.
"""

from __future__ import annotations

import os

import torch

from pretrain.errors import UserError

_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS promises the same bits; the second is smaller and slower


def compute_deterministically() -> None:
    """Make this process compute deterministically. Call it before the GPU is used and before ranks meet.

    torch then takes the deterministic form of an operation, or raises where it has none. Attention is flash attention with
    a deterministic backward, never cuDNN's. Compiled reductions take a fixed shape. NCCL keeps to rings, whose order of
    addition follows from the ranks alone, unless NCCL_ALGO says otherwise.

    Raises:
        UserError: CUBLAS_WORKSPACE_CONFIG has another value than cuBLAS needs for it.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise UserError(
            f"deterministic: true needs CUBLAS_WORKSPACE_CONFIG to be {' or '.join(_WORKSPACES)}, and it is {workspace}. "
            "Unset it, or leave deterministic out."
        )
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time, and nothing reads it
