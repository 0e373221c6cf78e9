"""Full weights for a moment, for a method that needs more than moments: `for name, full in gathered(weights): ...`"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from pretrain.sharded.guard import check_call
from pretrain.sharded.piece import Piece
from pretrain.sharded.weights import ShardedWeights


@torch.no_grad()
def gathered(weights: ShardedWeights, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each named weight (every weight by default) in full, float32, on every rank, one at a time.

    Changes made in place are written back to the master as the loop goes on, and to the working copies at its end,
    also when the loop is left early. Every rank must make the same change. Collective: run it on all ranks, to the
    same point. Memory: one full weight.
    """
    chosen = check_call(weights, "gathered", weights.layout if names is None else names)
    for piece in weights.placement.edit(chosen):
        full = _assemble(piece)
        try:
            yield piece.name, full
        finally:
            mine = piece.slice.of(full).reshape(-1)[piece.start : piece.start + piece.master.numel()]
            piece.master.copy_(mine)


def _assemble(piece: Piece) -> torch.Tensor:
    """The full weight: each rank contributes what it counts of it, and zeros elsewhere."""
    device = "cuda" if dist.get_backend() == "nccl" else piece.master.device
    part = torch.zeros(piece.slice.numel, dtype=torch.float32, device=device)
    part[piece.counted_start : piece.counted_start + piece.counted.numel()] = piece.counted
    full = part.view(piece.slice.shape) if piece.slice.dim is None else _placed(part, piece)
    dist.all_reduce(full)
    return full


def _placed(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A full weight that holds the flat tensor-parallel slice `part` at its place, and zeros elsewhere."""
    full = part.new_zeros(piece.slice.shape)
    place = piece.slice.of(full)
    place.copy_(part.view(place.shape))
    return full
