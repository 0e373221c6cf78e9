"""ZeRO stage 0: every data-parallel rank holds every weight in full.

    [ W1 W2 W3 W4 W5 W6 W7, whole, on every rank ]      master, fp32   FP16_UnfusedOptimizer.fp32_groups
    [ W1 W2 W3 W4 W5 W6 W7, whole, on every rank ]      working copy   parameter.data

In fp32 the parameter is its own master and the optimizer is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch

from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.owner import Owner
from pretrain.sharded.piece import Piece

Group = tuple[Sequence[torch.nn.Parameter], Sequence[torch.Tensor]]


class Stage0(Owner):
    """The placement of an engine without ZeRO."""

    def __init__(self, engine: Engine, groups: Sequence[Group]) -> None:
        """Bind to an engine.

        Args:
            engine: an engine at ZeRO stage 0.
            groups: the parameters of each parameter group, and their masters in the same order.
        """
        super().__init__(engine)
        self.replicas = engine.dp_world_size
        self.replica = torch.distributed.get_rank(engine.data_parallel_group)
        self.groups = groups

    def pieces(self, names: Set[str]) -> Iterator[Piece]:
        for parameter, master in self._masters(names):
            yield self._piece(parameter, master)

    def edit(self, names: Set[str]) -> Iterator[Piece]:
        for parameter, master in self._masters(names):
            try:
                yield self._piece(parameter, master)
            finally:
                if parameter is not master:
                    parameter.data.copy_(master.data)

    def exact_copy(self, name: str) -> torch.Tensor | None:
        """Return None: every rank has edited its own full copies."""
        return None

    def refresh(self, names: Set[str]) -> None:
        """Do nothing, see `exact_copy`."""

    def put(self, name: str, part: torch.Tensor) -> None:
        """Do nothing, see `exact_copy`."""

    def _piece(self, parameter: torch.nn.Parameter, master: torch.Tensor) -> Piece:
        return self.piece(self.name(parameter), 0, master.data.view(-1), self.replicas, self.replica)

    def _masters(self, names: Set[str]) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        for parameters, masters in self.groups:
            for parameter, master in zip(parameters, masters, strict=True):
                if self.name(parameter) in names:
                    yield parameter, master
