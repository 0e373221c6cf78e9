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
    """Yield each named weight in full on every rank, one at a time. Collective.

    A change in place reaches every copy when the next weight is asked for or the loop is left. This takes no
    communication, so every rank must make the same change. Run the loop on all ranks. Leave it early, if at all, on all
    of them at the same weight. An exception on one rank starts no collective of its own.

    The memory is that of one full weight and of this rank's tensor-parallel slice of it.

    Args:
        weights: the weights of an engine.
        names: the weights to gather, every weight by default. They come in the order of the optimizer.

    Yields:
        The name of a weight, and the weight in its own shape, float32.

    Raises:
        RuntimeError: between the micro-batches of a step.
        ValueError: for an unknown name, or where the ranks ask for different weights.
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
    """Return the named weights in full on every rank, by one all-reduce for all of them. Collective.

    Meant for scalars and vectors, because the memory is that of all of them at once.

    Args:
        weights: the weights of an engine.
        names: weights that tensor parallelism does not cut.

    Returns:
        Each weight by its name, in its own shape, float32 on the engine's device, in the order of the layout.

    Raises:
        RuntimeError: between the micro-batches of a step.
        ValueError: for an unknown name, or where the ranks ask for different weights.
    """
    chosen = check_call(weights.engine, weights.layout, "small_weights", names)
    if not chosen:
        return {}
    # The order of the layout is the same on every rank.
    shapes = {name: weight.shape for name, weight in weights.layout.items() if name in chosen}
    flat = torch.zeros(sum(map(prod, shapes.values())), dtype=torch.float32, device=weights.engine.device)
    places = dict(zip(shapes, flat.split([prod(shape) for shape in shapes.values()]), strict=True))
    for piece in weights.placement.pieces(chosen):
        places[piece.name][piece.counted_start : piece.counted_start + piece.counted.numel()] = piece.counted
    dist.all_reduce(flat)
    return {name: places[name].view(shape) for name, shape in shapes.items()}


def _assemble(piece: Piece) -> torch.Tensor:
    """Return the full weight: each rank contributes the elements that it counts, and zeros elsewhere. Collective."""
    device = "cuda" if dist.get_backend() == "nccl" else piece.master.device
    part = torch.zeros(piece.slice.numel, dtype=torch.float32, device=device)
    part[piece.counted_start : piece.counted_start + piece.counted.numel()] = piece.counted
    full = part.view(piece.slice.shape) if piece.slice.dim is None else _placed(part, piece)
    dist.all_reduce(full)
    return full


def _placed(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Return a full weight that holds the flat tensor-parallel slice `part` at its place, and zeros elsewhere."""
    full = part.new_zeros(piece.slice.shape)
    place = piece.slice.of(full)
    place.copy_(part.view(place.shape))
    return full
