"""Where the pieces of each weight live on this rank, for every DeepSpeed optimizer that keeps them.

Under mixed precision a weight exists twice: the working copy that forward reads and the fp32 master that the
optimizer steps. The optimizer rewrites the working copy from the master at every step, so whoever changes a weight
must change the master and then refresh the working copy. A `Placement` knows both for one kind of engine:

    engine                master of this rank                      working copy
    ZeRO-3                a range of every weight                  the same range, plus resident full copies of small
                                                                   weights (the "persistent" ones)
    ZeRO-1, ZeRO-2        a slice of all weights laid end to end   every weight in full
    stage 0, fp32         every weight in full                     the same memory
    stage 0, bf16         every weight in full                     every weight in full

All of this is DeepSpeed 0.19 as found by experiment; docs/sharded_weights.md tells the story.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from pretrain.errors import UserError


@dataclass(frozen=True)
class Piece:
    """The part of one weight that this rank owns, possibly empty; padding is never part of it.

    name: the weight's name in the model.
    start: index of the first owned element in the flattened full weight.
    master: (owned elements,) float32 view of the optimizer's copy; writing to it changes the optimizer's state.
    """

    name: str
    start: int
    master: torch.Tensor


class Placement(Protocol):
    """Where one kind of engine keeps its weights. `replicated` is True where every rank owns every weight in full."""

    replicated: bool

    def pieces(self) -> Iterator[Piece]:
        """This rank's piece of every weight, in the same order on every rank."""

    def refresh(self, changed: Set[str]) -> None:
        """Make the working copies of the named weights follow their masters. Collective: call it on every rank."""


def placement_of(engine) -> Placement:
    """The placement of a DeepSpeed engine's weights. Raises UserError for a kind of engine that is not supported."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _Zero3(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _Zero12(optimizer, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _BF16Optimizer(optimizer, names)
    if isinstance(optimizer, torch.optim.Optimizer) and engine.zero_optimization_stage() == 0:
        return _Plain(optimizer, names)
    raise UserError(
        f"weights kept by DeepSpeed's {type(optimizer).__name__} cannot be controlled exactly yet. "
        "Use bf16 or fp32 with ZeRO stage 0, 1, 2 or 3."
    )


class _Zero3:
    """ZeRO-3: each weight is cut in world-size equal ranges, the last ones padded; rank r owns range r."""

    replicated = False

    def __init__(self, optimizer, names: dict[int, str]) -> None:
        self.optimizer, self.names = optimizer, names

    def pieces(self) -> Iterator[Piece]:
        for parameter, master, _ in self._ranges():
            start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
            owned = max(0, min(master.numel(), parameter.ds_numel - start))
            yield Piece(self.names[id(parameter)], start, master[:owned])

    def refresh(self, changed: Set[str]) -> None:
        for parameter, master, working in self._ranges():
            if self.names[id(parameter)] in changed and working.data_ptr() != master.data_ptr():
                working.copy_(master)
        self._refresh_resident_copies(changed)
        self.optimizer.invalidate_secondary_tensor()

    def _ranges(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]:
        """Every parameter with this rank's range of its master and of its working copy, padding included."""
        optimizer = self.optimizer
        for parameters, master, working in zip(
            optimizer.fp16_groups,
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups_flat,
            strict=True,
        ):
            lengths = [parameter.ds_tensor.ds_numel for parameter in parameters]
            ranges = zip(master.data.split(lengths), working.data.split(lengths), strict=True)
            yield from ((parameter, *both) for parameter, both in zip(parameters, ranges, strict=True))

    def _refresh_resident_copies(self, changed: Set[str]) -> None:
        """Small weights stay gathered between steps and forward reads those copies: one all-gather fills them anew."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        resident = [
            parameter
            for parameter in self.optimizer.persistent_parameters
            if parameter.ds_status is ZeroParamStatus.AVAILABLE and self.names[id(parameter)] in changed
        ]
        if not resident:
            return
        mine = torch.cat([parameter.ds_tensor.data for parameter in resident])
        everyones = mine.new_empty(dist.get_world_size(), mine.numel())
        dist.all_gather_into_tensor(everyones.view(-1), mine)
        lengths = [parameter.ds_tensor.ds_numel for parameter in resident]
        for parameter, ranges in zip(resident, everyones.split(lengths, dim=1), strict=True):
            parameter.data.view(-1).copy_(ranges.reshape(-1)[: parameter.ds_numel])


class _Zero12:
    """ZeRO-1 and 2: the weights of a group laid end to end, cut in world-size slices; rank r's master is slice r.

    Reads the round-robin order, not `_hp_mapping`, which is wrong when `round_robin_gradients` is on.
    """

    replicated = False

    def __init__(self, optimizer, names: dict[int, str]) -> None:
        self.optimizer, self.names = optimizer, names

    def pieces(self) -> Iterator[Piece]:
        optimizer = self.optimizer
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.partition_size[group]
            slice_start = dist.get_rank(optimizer.real_dp_process_group[group]) * size
            master = optimizer.single_partition_of_fp32_groups[group].data
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                first = max(offset, slice_start)
                last = max(first, min(offset + parameter.numel(), slice_start + size))
                owned = master[first - slice_start : last - slice_start] if last > first else master[:0]
                yield Piece(self.names[id(parameter)], first - offset, owned)

    def refresh(self, changed: Set[str]) -> None:
        self.optimizer.update_lp_params()


class _BF16Optimizer:
    """DeepSpeed's BF16_Optimizer: as ZeRO-1, but the optimizer says itself which fragment of a weight it holds."""

    replicated = False

    def __init__(self, optimizer, names: dict[int, str]) -> None:
        self.optimizer, self.names = optimizer, names

    def pieces(self) -> Iterator[Piece]:
        for parameters, flat in zip(self.optimizer.bf16_groups, self.optimizer.fp32_groups_flat_partition, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    yield Piece(self.names[id(parameter)], parameter.numel(), flat.data[:0])
                else:
                    yield Piece(
                        self.names[id(parameter)],
                        mapping.lp_fragment_address.start,
                        mapping.hp_fragment.data.view(-1),
                    )

    def refresh(self, changed: Set[str]) -> None:
        self.optimizer.update_lp_params()


class _Plain:
    """Stage 0 in fp32: one copy of each weight, in full on every rank."""

    replicated = True

    def __init__(self, optimizer, names: dict[int, str]) -> None:
        self.optimizer, self.names = optimizer, names

    def pieces(self) -> Iterator[Piece]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield Piece(self.names[id(parameter)], 0, parameter.data.view(-1))

    def refresh(self, changed: Set[str]) -> None:
        """Nothing to do: master and working copy are the same memory."""
