"""Full weights for a moment, for a method that needs more than moments: `for name, full in gathered(weights): ...`"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch
import torch.distributed as dist

from pretrain.sharded.collectives import check_call
from pretrain.sharded.piece import Piece
from pretrain.sharded.weights import ShardedWeights


@torch.no_grad()
def gathered(weights: ShardedWeights, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each named weight (every weight by default) in full, float32, on every rank, one at a time.

    What is changed in place goes to every copy as soon as the next weight is asked for or the loop is left, and without
    communication: every rank must make the same change. Collective: run it on all ranks, and leave it early, if at all,
    on all of them at the same weight. An exception on one rank starts no collective of its own.
    Memory: one full weight, and this rank's tensor-parallel slice of it.
    """
    chosen = check_call(weights.engine, weights.layout, "gathered", weights.layout if names is None else names)
    for piece in weights.placement.edit(chosen):
        full = _assemble(piece)
        try:
            yield piece.name, full
        finally:
            part = piece.slice.of(full)
            piece.master.copy_(part.reshape(-1)[piece.start : piece.start + piece.master.numel()])
            weights.placement.put(piece.name, part)


@torch.no_grad()
def small_weights(weights: ShardedWeights, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The named weights in full, float32, on every rank and its device, by one all-reduce for all of them. Collective.

    Meant for scalars and vectors: the memory is that of all of them at once. Not for weights that tensor parallelism cuts.
    """
    chosen = check_call(weights.engine, weights.layout, "small_weights", names)
    if not chosen:
        return {}
    shapes = {
        name: weight.shape for name, weight in weights.layout.items() if name in chosen
    }  # in one order everywhere
    flat = torch.zeros(sum(map(prod, shapes.values())), dtype=torch.float32, device=weights.engine.device)
    places = dict(zip(shapes, flat.split([prod(shape) for shape in shapes.values()]), strict=True))
    for piece in weights.placement.pieces(chosen):
        places[piece.name][piece.counted_start : piece.counted_start + piece.counted.numel()] = piece.counted
    dist.all_reduce(flat)
    return {name: places[name].view(shape) for name, shape in shapes.items()}


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
