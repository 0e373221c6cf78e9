"""Full weights for a moment, for a method that needs more than moments: `for name, full in gathered(weights): ...`"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from pretrain.sharded.guard import check_call
from pretrain.sharded.pieces import Piece
from pretrain.sharded.weights import ShardedWeights


@torch.no_grad()
def gathered(weights: ShardedWeights, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each named weight (every weight by default) in full, float32, on every rank, one at a time.

    Changes made in place are written back to the master as the loop goes on, and to the working copies at its end,
    also when the loop is left early. Every rank must make the same change. Collective: run it on all ranks, to the
    same point. Memory: one full weight.
    """
    chosen = check_call(weights.engine, weights.layout, weights.layout if names is None else names)
    try:
        for piece in weights.pieces(chosen):
            shape = weights.layout[piece.name].shape
            full = _assemble(piece, weights).view(shape)
            try:
                yield piece.name, full
            finally:
                piece.master.copy_(full.view(-1)[piece.start : piece.start + piece.master.numel()])
    finally:
        weights.placement.refresh(chosen)


def _assemble(piece: Piece, weights: ShardedWeights) -> torch.Tensor:
    """The flat full weight: each rank contributes its piece, and zeros elsewhere."""
    if weights.placement.replicated:
        return piece.master.clone()
    device = "cuda" if dist.get_backend() == "nccl" else piece.master.device
    full = torch.zeros(weights.layout[piece.name].numel, dtype=torch.float32, device=device)
    full[piece.start : piece.start + piece.master.numel()] = piece.master
    dist.all_reduce(full)
    return full
