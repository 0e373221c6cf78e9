"""ZeRO-3: each weight is cut in equal ranges, one for each data-parallel rank. The last ones are padded.

    rank 0 of 3             rank 1                  rank 2
    [ W[0:a]   ]            [ W[a:2a]  ]            [ W[2a:] pad ]      master, fp32   fp32_partitioned_groups_flat
    [ W[0:a]   ]            [ W[a:2a]  ]            [ W[2a:] pad ]      working copy   fp16_partitioned_groups_flat
    [ W, whole, if it is small ]  ...               ...                 resident copy  parameter.data

A flat buffer holds the ranges of one sub-group of weights, one after another; `parameter.ds_tensor` is a view of the
working one. In fp32 both may be the same memory (on a CPU they are not). Weights under
`stage3_param_persistence_threshold` stay resident in full between steps, and forward reads that copy. With the optimizer
offloaded to NVMe a sub-group's master is in memory only while it is swapped in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pretrain.sharded.owner import Owner
from pretrain.sharded.piece import Piece

if TYPE_CHECKING:

    class Zero3Parameter(torch.nn.Parameter):
        """A parameter with the attributes that DeepSpeed's `zero.Init` gives it."""

        ds_tensor: Any  # this rank's range as a tensor, with a `ds_numel` of its own that counts the padding
        ds_secondary_tensor: torch.Tensor | None
        ds_numel: int
        ds_persist: bool
        ds_status: object
        ds_process_group: dist.ProcessGroup
        ds_zero_partition_rank: int


class Zero3(Owner):
    """The placement of ZeRO-3's DeepSpeedZeroOptimizer_Stage3."""

    parameters: Mapping[str, Zero3Parameter]

    def pieces(self, names: Set[str]) -> Iterator[Piece]:
        for number in self._sub_groups(names):
            with self._master(number, changed=False) as master:
                for parameter, owned, _ in self._ranges(number, master, names):
                    yield self._piece(parameter, owned)

    def edit(self, names: Set[str]) -> Iterator[Piece]:
        for number in self._sub_groups(names):
            with self._master(number, changed=True) as master:
                for parameter, owned, working in self._ranges(number, master, names):
                    try:
                        yield self._piece(parameter, owned)
                    finally:
                        if working.data_ptr() != owned.data_ptr():
                            working.copy_(owned)
                        parameter.ds_secondary_tensor = None  # ZeRO++ keeps one more copy within each node

    def exact_copy(self, name: str) -> torch.Tensor | None:
        parameter = self.parameters[name]
        return parameter.data if self._is_whole(parameter) and parameter.dtype == torch.float32 else None

    def refresh(self, names: Set[str]) -> None:
        whole = [
            parameter for name, parameter in self.parameters.items() if name in names and self._is_whole(parameter)
        ]
        if any(not parameter.ds_persist for parameter in whole):
            # After a forward without a backward, large weights are whole as well until the next step drops them.
            self.optimizer._partition_all_parameters()
            if resident := self.optimizer.persistent_parameters:
                resident[0].all_gather(resident)
        elif whole:
            self._gather_resident(whole)

    def put(self, name: str, part: torch.Tensor) -> None:
        if self._is_whole(self.parameters[name]):
            self.parameters[name].data.copy_(part)

    @staticmethod
    def _is_whole(parameter: Zero3Parameter) -> bool:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        return parameter.ds_status is ZeroParamStatus.AVAILABLE

    def _sub_groups(self, names: Set[str]) -> Iterator[int]:
        """Yield the numbers of the sub-groups that hold any of the named weights."""
        for number, parameters in enumerate(self.optimizer.fp16_groups):
            if any(self.name(parameter) in names for parameter in parameters):
                yield number

    @contextmanager
    def _master(self, number: int, changed: bool) -> Iterator[torch.Tensor]:
        """Give the flat master of a sub-group, swapped in for the moment if it lives on NVMe."""
        optimizer = self.optimizer
        if not optimizer._swappable_optimizer_subgroup(number):
            yield optimizer.fp32_partitioned_groups_flat[number].data
            return
        optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield optimizer.fp32_partitioned_groups_flat[number].data
        finally:
            if changed:
                optimizer._writeback_swap_state(number, write_opt_state=True, write_gradients=False)
            else:
                optimizer._release_swap_buffers(number)

    def _ranges(
        self, number: int, master: torch.Tensor, names: Set[str]
    ) -> Iterator[tuple[Zero3Parameter, torch.Tensor, torch.Tensor]]:
        """Yield the named weights of a sub-group with this rank's ranges of their master and their working copy.

        The ranges hold the padding.
        """
        parameters = self.optimizer.fp16_groups[number]
        lengths = [parameter.ds_tensor.ds_numel for parameter in parameters]
        working = self.optimizer.fp16_partitioned_groups_flat[number].data
        for parameter, owned, copy in zip(parameters, master.split(lengths), working.split(lengths), strict=True):
            if self.name(parameter) in names:
                yield parameter, owned, copy

    def _piece(self, parameter: Zero3Parameter, padded: torch.Tensor) -> Piece:
        start = parameter.ds_zero_partition_rank * padded.numel()
        owned = max(0, min(padded.numel(), parameter.ds_numel - start))
        return self.piece(self.name(parameter), start, padded[:owned])

    @staticmethod
    def _gather_resident(resident: list[Zero3Parameter]) -> None:
        """Fill all resident copies from the ranks' ranges by one all-gather, as DeepSpeed's own step does."""
        group = resident[0].ds_process_group
        mine = torch.cat([parameter.ds_tensor.data.to(parameter.device) for parameter in resident])
        everyones = mine.new_empty(dist.get_world_size(group), mine.numel())
        dist.all_gather_into_tensor(everyones.view(-1), mine, group=group)
        lengths = [parameter.ds_tensor.ds_numel for parameter in resident]
        for parameter, ranges in zip(resident, everyones.split(lengths, dim=1), strict=True):
            parameter.data.view(-1).copy_(ranges.reshape(-1)[: parameter.ds_numel])
