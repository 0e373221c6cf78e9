"""ZeRO-1 and 2: the weights of a parameter group are laid end to end and cut in equal slices. Rank r's master is slice r.

    rank 0 of 3             rank 1                  rank 2
    [ W1 W2 W| ]            [ |3 W4 W5 ]            [ W6 W7 pad  ]      master, fp32   single_partition_of_fp32_groups
    [ W1 W2 W3 W4 W5 W6 W7, whole, on every rank                 ]      working copy   parameter.data

For bf16 with ZeRO-1 and fp32 gradient accumulation DeepSpeed has another class, BF16_Optimizer, of the same layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Set

import torch
import torch.distributed as dist

from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.owner import Owner
from pretrain.sharded.piece import Piece


class _FullWorkingCopies(Owner, ABC):
    """The common part of both kinds: every rank keeps every working copy in full."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.group = engine.data_parallel_group

    @abstractmethod
    def pieces(self, names: Set[str]) -> Iterator[Piece]: ...

    def edit(self, names: Set[str]) -> Iterator[Piece]:
        return self.pieces(names)

    def exact_copy(self, name: str) -> torch.Tensor | None:
        copy = self.parameters[name].data
        return copy if copy.dtype == torch.float32 else None

    def refresh(self, names: Set[str]) -> None:
        named = sum(self.parameters[name].numel() for name in names)
        if 2 * named > sum(parameter.numel() for parameter in self.parameters.values()):
            # The end of the optimizer's own step: copy the slice, all-gather all weights.
            self.optimizer.update_lp_params()
            return
        for piece in self.pieces(names):
            copy = self.parameters[piece.name].data.view(-1)
            copy.zero_()
            copy[piece.start : piece.start + piece.master.numel()].copy_(piece.master)
            dist.all_reduce(copy, group=self.group)  # each element comes from one rank: nothing is rounded

    def put(self, name: str, part: torch.Tensor) -> None:
        self.parameters[name].data.copy_(part)


class Zero12(_FullWorkingCopies):
    """The placement of DeepSpeedZeroOptimizer.

    It reads the round-robin order. `_hp_mapping` is wrong when `round_robin_gradients` is on.
    """

    def pieces(self, names: Set[str]) -> Iterator[Piece]:
        optimizer = self.optimizer
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.partition_size[group]
            slice_start = dist.get_rank(optimizer.real_dp_process_group[group]) * size
            master = optimizer.single_partition_of_fp32_groups[group].data
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                if self.name(parameter) not in names:
                    continue
                first = max(offset, slice_start)
                last = max(first, min(offset + parameter.numel(), slice_start + size))
                owned = master[first - slice_start : last - slice_start] if last > first else master[:0]
                yield self.piece(self.name(parameter), first - offset, owned)


class BF16Optimizer(_FullWorkingCopies):
    """The placement of BF16_Optimizer, which records for each weight which fragment of it this rank holds."""

    def pieces(self, names: Set[str]) -> Iterator[Piece]:
        for parameters, flat in zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_flat_partition, strict=True):
            for parameter in parameters:
                if self.name(parameter) not in names:
                    continue
                fragment = parameter._hp_mapping
                if fragment is None:
                    yield self.piece(self.name(parameter), parameter.numel(), flat.data[:0])
                else:
                    start, master = fragment.lp_fragment_address.start, fragment.hp_fragment.data.view(-1)
                    yield self.piece(self.name(parameter), start, master)
