"""Faults of placement that a careless edit could bring: each function plants one in its process, before it trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from pretrain.data.batches.batch import MicroBatch
from pretrain.methods import sigma_reparam
from pretrain.resilience import stop_requests
from pretrain.sharded import ShardedWeights, collectives
from tests.fakecuda.cases import BATCH_SIZE
from tests.support.faults import bad_batches, replace


def two_bad_steps() -> None:
    """Make the losses of steps 5 and 6 NaN. This fault is of training: a run writes an autopsy and goes back."""
    bad_batches(4 * BATCH_SIZE, 6 * BATCH_SIZE - 1, float("nan"))()


def batch_stays_on_host() -> None:
    """Leave each micro-batch where it was read."""
    replace(MicroBatch, "to", lambda self, device: MicroBatch(self.tokens.long(), self.counted, self.positions))


def digest_stays_on_host() -> None:
    """Gather the digests of calls as they come, from the CPU, over the group of all ranks."""

    def all_gather(mine: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        return torch.stack(gathered)

    replace(collectives, "all_gather", all_gather)


def flags_on_device() -> None:
    """Agree on stop requests, in the group of the CPUs, with a tensor of the device."""

    def agree(*values: int) -> list[int]:
        agreed = torch.tensor(values, dtype=torch.int64, device="cuda")
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=stop_requests.control_group())
        return agreed.tolist()

    replace(stop_requests.StopRequests, "_agree", staticmethod(agree))


def vectors_restored_on_host() -> None:
    """Use the vectors of sigma_reparam as a checkpoint has them."""
    replace(sigma_reparam.SpectralGate, "_vectors_near", lambda self, weight: self.vectors or self.start(weight))


def weights_are_not_filled() -> None:
    """Train the weights that fresh memory holds."""
    replace(ShardedWeights, "fill_", lambda self, seed, rule: None)


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        two_bad_steps,
        batch_stays_on_host,
        digest_stays_on_host,
        flags_on_device,
        vectors_restored_on_host,
        weights_are_not_filled,
    )
}
