"""The flat tensors that the base optimizer steps, and the gradients that DeepSpeed has averaged for them.

A flat tensor holds this rank's masters of many weights end to end, or one weight at stage 0. Adam's moments and the averaged
gradients have its layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pretrain.sharded.piece import Slice
from pretrain.sharded.stage0 import Stage0
from pretrain.sharded.weights import ShardedWeights
from pretrain.sharded.zero12 import BF16Optimizer, Zero12

AVERAGE = "weight_average"  # the average of a flat tensor over steps, in the optimizer's state of it


def base_optimizer(weights: ShardedWeights) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed wraps. Its state is kept by flat tensor."""
    optimizer = weights.engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def stepped_tensors(weights: ShardedWeights) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield each flat tensor that the base optimizer steps, with its parameter group."""
    optimizer, groups = weights.engine.optimizer, base_optimizer(weights).param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # between steps ZeRO-3 leaves its parameter groups empty
        for number, tensor in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield tensor, groups[optimizer.sub_group_to_group_id[number]]
    else:
        yield from ((tensor, group) for group in groups for tensor in group["params"])


def state_of(weights: ShardedWeights, master: torch.Tensor) -> tuple[dict[str, Any], int]:
    """Return the optimizer's state of the flat tensor of which `master`, a piece's, is a view, and its first element there."""
    state = base_optimizer(weights).state
    for flat, _ in stepped_tensors(weights):
        place = int(master.storage_offset() - flat.storage_offset())
        same = flat.untyped_storage().data_ptr() == master.untyped_storage().data_ptr()
        if same and 0 <= place <= flat.numel() - master.numel():
            return state[flat], place
    raise RuntimeError("a master is no part of what the optimizer steps")


def has_whole_momentums(weights: ShardedWeights) -> bool:
    """Return whether Muon's momentum has a layout of its own: at ZeRO-1 and 2, unless the optimizer is offloaded.

    Each rank that steps any element of a matrix then keeps the momentum of the whole matrix.
    """
    by_muon = any(group.get("use_muon") for group in base_optimizer(weights).param_groups)
    return by_muon and isinstance(weights.placement, Zero12) and not weights.engine.optimizer.cpu_offload


def fresh_whole_momentums(weights: ShardedWeights) -> Iterator[tuple[str, Slice, torch.Tensor]]:
    """Make the momentum of each matrix that this rank steps any of, where `has_whole_momentums`.

    Yields:
        The matrix's name, its slice, and the momentum to be filled: (elements,) float32, all zero.
    """
    optimizer, base, placement = weights.engine.optimizer, base_optimizer(weights), weights.placement
    assert isinstance(placement, Zero12)
    for number, group in enumerate(base.param_groups):
        parameters = optimizer.params_in_partition[number]
        if not group.get("use_muon") or not parameters:
            continue
        flat = group["params"][0]
        sizes = [parameter.numel() for parameter in parameters]
        base.state[flat]["momentum_buffer"] = momentum = torch.zeros(sum(sizes), device=flat.device)
        for parameter, part in zip(parameters, momentum.split(sizes), strict=True):
            name = placement.name(parameter)
            yield name, placement.slices[name], part


def averaged_gradients(weights: ShardedWeights, number: int, flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the averaged gradients of a flat tensor, end to end in its layout.

    Call it between the last backward and the engine's step. The gradients are neither clipped nor rejected then.

    Args:
        weights: the weights of the engine.
        number: which of the `stepped_tensors` it is.
        flat: that tensor.
    """
    optimizer, placement = weights.engine.optimizer, weights.placement
    if isinstance(placement, Stage0):
        parameters = [parameter for group, _ in placement.groups for parameter in group]
        grad = parameters[number].grad
        return [torch.zeros_like(flat) if grad is None else grad]
    if isinstance(placement, BF16Optimizer):
        return [optimizer.fp32_groups_gradient_flat_partition[number]]
    if flat.grad is not None:  # offloaded to the CPU
        if hasattr(optimizer, "_wait_for_offload_copies"):
            optimizer._wait_for_offload_copies()
        return [flat.grad]
    return optimizer.averaged_gradients[number]
