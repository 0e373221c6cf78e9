"""The validation loss, averaged over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks
from pretrain.engine.step import count_targets, losses_of
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.monitor.phase import enter
from pretrain.sharded.engine_protocol import Engine


@torch.no_grad()
def validation_loss(
    engine: Engine, batches: Iterable[MicroBatch], ranks: Ranks, stopped: Callable[[], object]
) -> float | None:
    """Return the mean cross-entropy, in nats, over the targets that count in the `batches` of all ranks. Collective.

    Args:
        engine: computes the losses.
        batches: this rank's share of the validation set.
        ranks: this rank's place among all.
        stopped: asked before each batch, with the same answer on every rank. If it is true, None is returned.
    """
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of cross-entropies, of targets that count
    for batch in batches:
        if stopped():
            return None
        enter("evaluation")
        batch = batch.to(ranks.device)
        counted = count_targets(batch)
        mean = losses_of(engine, batch)[CROSS_ENTROPY].double()
        sums += torch.stack([mean * counted, counted.double()])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])
