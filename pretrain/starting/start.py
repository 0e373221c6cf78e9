"""Gives the weights of an engine the values of a starting point: each rank reads its own pieces, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isfinite

import torch

from pretrain.checkpoints.finite import refuse_unless_finite
from pretrain.checkpoints.manifest import verify
from pretrain.checkpoints.method_state import load_method_state
from pretrain.checkpoints.stored import StoredTensor
from pretrain.config.schema import Config
from pretrain.distributed.ranks import Ranks, from_first_rank, on_every_rank
from pretrain.errors import UserError
from pretrain.methods import Method
from pretrain.model.layout import Weight
from pretrain.monitor.phase import current, enter
from pretrain.sharded import Moments, ShardedWeights
from pretrain.sharded.draws import Draw, Normal, ZeroRow
from pretrain.starting.point import StartingPoint


def start_from(
    point: StartingPoint, weights: ShardedWeights, config: Config, rule: Callable[[Weight], Draw], ranks: Ranks
) -> dict[str, Moments]:
    """Load the weights of `point`, shrink and perturb them if the run says so, and let the methods take over. Collective.

    Args:
        point: where the run starts from.
        weights: the weights of the engine.
        config: the run, with methods that `bind_methods` has bound.
        rule: maps a weight that is not loaded, because a method has added it, to its distribution.
        ranks: this rank's place among all.

    Returns:
        The moments of every weight.

    Raises:
        UserError: on every rank. The files do not hold these weights, or hold NaN, infinity or what fp16 does not hold.
    """
    if (checkpoint := point.source.checkpoint) is not None:
        on_every_rank(lambda: verify(checkpoint, ranks.rank, ranks.world_size))
        from_first_rank(lambda: refuse_unless_finite(checkpoint))
    stored = on_every_rank(point.tensors)
    if added := weights.layout.keys() - stored.keys():
        weights.fill_(config.seed, rule, sorted(added))
    read_into(weights, stored)
    on_every_rank(lambda: _refuse_unless_finite(weights, stored, point))
    if config.warm_start is not None:
        shrink_and_perturb(weights, config, stored.keys())
    if checkpoint is not None and point.same_methods:
        on_every_rank(lambda: load_method_state(checkpoint, config.methods, weights.engine.module))
    else:
        take_over(weights, config.methods)
    return weights.moments()


@torch.no_grad()
def read_into(weights: ShardedWeights, stored: Mapping[str, StoredTensor]) -> None:
    """Give the named weights the stored values, in every copy. Memory holds one block of a file besides. Collective."""

    def read() -> None:
        for piece in weights.placement.edit(set(stored)):
            enter(current().name)  # the watchdog sees progress
            if piece.master.numel():
                stored[piece.name].read_into(piece.master, piece.slice, piece.start)

    on_every_rank(read)
    weights.placement.refresh(set(stored))


def shrink_and_perturb(weights: ShardedWeights, config: Config, names: Iterable[str]) -> None:
    """Replace each loaded matrix W by shrink W + noise N(0, 1). Norms and biases stay. Collective."""
    assert config.warm_start is not None
    noise = config.warm_start.noise

    def draw(weight: Weight) -> Draw:
        if weight.padding_row is None:
            return Normal(noise)
        return ZeroRow(Normal(noise), weight.padding_row, (weight.shape[0], weight.shape[1]))

    matrices = sorted(name for name in names if weights.layout[name].fan_in)
    weights.perturb_(config.seed, config.warm_start.shrink, draw, matrices)


def take_over(weights: ShardedWeights, methods: Sequence[Method]) -> None:
    """Let each method change the weights of a plain model so that forward computes what that model does. Collective."""
    for method in reversed(sorted(methods, key=lambda method: method.fold_order)):
        on_every_rank(partial(method.take_over, weights))


def _refuse_unless_finite(weights: ShardedWeights, names: Iterable[str], point: StartingPoint) -> None:
    """Raise UserError for weights with NaN or infinity, in the masters or in working copies of fp16. Collective."""
    statistics, largest = weights.statistics(names), torch.finfo(torch.float16).max
    for name, each in statistics.items():
        if not isfinite(each.squared_norm):
            raise UserError(
                f"model.init_from: {point.source.name} holds NaN or infinity in {name}. Take another model."
            )
        if weights.engine.fp16_enabled() and each.absolute_maximum > largest:
            raise UserError(
                f"model.init_from: {point.source.name} holds values up to {each.absolute_maximum:.6g} in {name}, and fp16 ends "
                f"at {largest:,.0f}. Train in bf16."
            )
