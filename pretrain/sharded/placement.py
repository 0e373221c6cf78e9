"""The places of each weight's pieces on this rank, for every DeepSpeed optimizer that keeps them.

Under mixed precision a weight exists twice: the working copy that forward reads and the fp32 master that the
optimizer steps. The optimizer rewrites the working copy from the master at every step. A change of a weight must
therefore go to the master, and the working copy must follow. A `Placement` finds both for one kind of engine:

    engine                    master of this rank                    working copy                            file
    ZeRO-3                    a range of every weight                the same range, and resident full       zero3.py
                                                                     copies of small weights
    ZeRO-1, ZeRO-2            a slice of all weights laid end to end every weight in full                    zero12.py
    stage 0, bf16 or fp16     every weight in full                   every weight in full                    stage0.py
    stage 0, fp32             every weight in full                   the same memory                         stage0.py

All of this was found by experiment with DeepSpeed 0.19. docs/sharded_weights.md explains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Protocol

import torch

from pretrain.errors import UserError
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.piece import Piece
from pretrain.sharded.stage0 import Stage0
from pretrain.sharded.zero3 import Zero3
from pretrain.sharded.zero12 import BF16Optimizer, Zero12


class Placement(Protocol):
    """The place where one kind of engine keeps its weights.

    `pieces` and `edit` yield this rank's pieces of the named weights, in the same order on every rank. A piece is valid
    until the next one is asked for, because what is offloaded to NVMe is in memory only so long. Only `refresh` is
    collective.

    Attributes:
        tensor_ranks: the number of tensor-parallel ranks that the weights are cut among.
    """

    tensor_ranks: int

    def pieces(self, names: Set[str]) -> Iterator[Piece]:
        """Yield the pieces for reading. Local."""

    def edit(self, names: Set[str]) -> Iterator[Piece]:
        """Yield the pieces, whose masters may be changed in place. The same range of the working copy follows. Local.

        Afterwards the copies that hold more than this rank's range are stale, until `refresh` or `put`.
        """

    def exact_copy(self, name: str) -> torch.Tensor | None:
        """Return the full working copy of a weight, if there is one and it is float32 like the masters. Local.

        Under tensor parallelism it is that of this rank's slice. None also where `edit` leaves no copy stale.
        """

    def refresh(self, names: Set[str]) -> None:
        """Make the full working copies of edited weights follow their masters. Collective."""

    def put(self, name: str, part: torch.Tensor) -> None:
        """Give the full working copy of one edited weight its values, if there is one. Local.

        Args:
            name: the weight's name.
            part: the weight, or this rank's tensor-parallel slice of it, in the shape of the parameter.
        """


def placement_of(engine: Engine) -> Placement:
    """Return the placement of a DeepSpeed engine's weights.

    Raises:
        UserError: for a kind of engine that is not supported, and for weights that `Owner` refuses.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Zero3(engine)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return Zero12(engine)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return BF16Optimizer(engine)
    if engine.zero_optimization_stage() == 0 and isinstance(optimizer, torch.optim.Optimizer):
        return Stage0(engine, [(group["params"], group["params"]) for group in optimizer.param_groups])
    if engine.zero_optimization_stage() == 0 and hasattr(optimizer, "fp32_groups"):
        return Stage0(engine, list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)))
    raise UserError(
        f"weights kept by DeepSpeed's {type(optimizer).__name__} cannot be controlled exactly. "
        "Use bf16, fp16 or fp32 with ZeRO stage 0, 1, 2 or 3."
    )
