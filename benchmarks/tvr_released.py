"""A yardstick: the scheme of the released TVR callback, made to act on ZeRO's shards.

Like the release under FSDP, it takes one module after another, with two all-reduces each (sum and count, then squared
deviations about the mean), in the dtype of the storage and with temporaries as large as the shard. The release changes
nothing under DeepSpeed. This code works on each rank's piece of the master, and the working copies follow as they do for
Evenkeel's own engine. Source: bluorion-com/weight_rescaling, callbacks/tvr.py, written again from its description.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from pretrain.sharded import ShardedWeights


@torch.no_grad()
def apply_released(
    weights: ShardedWeights, names: Iterable[str], target_std: float, ratio_threshold: float
) -> set[str]:
    """Rescale each named weight whose deviation exceeds ratio_threshold * target_std. Collective.

    Returns:
        The names of the weights that were rescaled.
    """
    statistics = {piece.name: _mean_and_std(piece.master) for piece in weights.pieces(names)}
    high = {name: (mean, std) for name, (mean, std) in statistics.items() if std / target_std > ratio_threshold}
    if high:
        stale = set(high)
        for piece in weights.placement.edit(high.keys()):
            mean, std = high[piece.name]
            copies = [piece.master]
            if (copy := weights.placement.exact_copy(piece.name)) is not None:
                copies.append(copy)
                stale.remove(piece.name)
            for weight in copies:
                weight.copy_((weight - mean) * (target_std / std) + mean)
        weights.placement.refresh(stale)
    return set(high)


def _mean_and_std(local: torch.Tensor) -> tuple[float, float]:
    """Return the mean and deviation of the full weight of which this rank has the piece `local`."""
    total = torch.tensor([local.sum(), local.numel()], dtype=local.dtype, device=local.device)
    dist.all_reduce(total)
    mean = total[0] / total[1]
    squares = ((local - mean) ** 2).sum()
    dist.all_reduce(squares)
    return float(mean), float((squares / (total[1] - 1)).sqrt())
