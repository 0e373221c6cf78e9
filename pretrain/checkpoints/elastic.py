"""Loads training state of any layout into an engine of any other: number of ranks, ZeRO stage, tensor parallelism, precision.

Each rank reads the ranges that it owns of masters and moments, straight from the files of the ranks that wrote them, into
the tensors of its own optimizer. Nothing is converted and nothing is stored twice. Then the working copies follow the
masters, as after a change of weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch

from pretrain.checkpoints.deepspeed_files import put_steps_beside_moments
from pretrain.checkpoints.stored import Counters, StoredWeight
from pretrain.checkpoints.stored.weights import MOMENTUM
from pretrain.distributed.ranks import on_every_rank
from pretrain.errors import UserError
from pretrain.monitor.phase import current, enter
from pretrain.optimizers import Algorithm, algorithm_of
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.stepped_tensors import (
    AVERAGE,
    base_optimizer,
    fresh_whole_momentums,
    has_whole_momentums,
    state_of,
    stepped_tensors,
)

_BETWEEN_LINES_S = 10.0
_State = dict[str, Any]


@torch.no_grad()
def load_stored(
    engine: Engine, stored: Mapping[str, StoredWeight], counters: Counters, say: Callable[[str], None]
) -> None:
    """Load masters, moments and counters into `engine`, new or under way. Collective.

    Args:
        engine: the engine to load into.
        stored: the state of every weight, by name.
        counters: DeepSpeed's own counters.
        say: logs one line.

    Raises:
        UserError: on every rank. Before anything is loaded, if the weights or moments are not those of this engine; later
            if a file cannot be read.
    """
    weights = ShardedWeights(engine)
    on_every_rank(lambda: _check(weights, stored, _algorithm(weights)))
    on_every_rank(lambda: _fill(weights, stored, _Progress(weights, stored, say)))
    weights.placement.refresh(set(weights.layout))
    put_steps_beside_moments(engine.basic_optimizer)
    _count_on(engine, counters)


def _algorithm(weights: ShardedWeights) -> Algorithm:
    base = base_optimizer(weights)
    if (found := algorithm_of(base)) is None:
        raise UserError(
            f"the state of the optimizer {type(base).__name__} cannot be loaded into another layout: pretrain/optimizers has "
            "no file that says what it keeps. Resume on the same ranks with the same DeepSpeed file."
        )
    return found


def _check(weights: ShardedWeights, stored: Mapping[str, StoredWeight], algorithm: Algorithm) -> None:
    """Raise UserError unless `stored` holds these weights, and the same kind of moments for all that one optimizer steps."""
    for name, weight in weights.layout.items():
        found = stored[name].master.shape if name in stored else None
        if found != weight.shape:
            what = "no such weight" if found is None else f"one of shape {found}"
            raise UserError(
                f"the model has the weight {name} of shape {weight.shape}, and the checkpoint holds {what}."
            )
    if more := sorted(stored.keys() - weights.layout.keys()):
        raise UserError(f"the checkpoint holds the weight {more[0]}, which the model does not have.")
    by_kind: dict[str, list[str]] = {}
    for name, held in stored.items():
        kept = algorithm.of_weight(weights.layout[name])
        if (moments := _of_optimizer(held)) and moments != kept.moments.keys():
            raise UserError(
                f"the checkpoint holds {', '.join(sorted(moments))} of {name}, and this run's optimizer, {kept.name}, keeps "
                f"{', '.join(sorted(kept.moments))}: it is another optimizer's."
            )
        by_kind.setdefault(kept.name, []).append(name)
    for first, *others in by_kind.values():
        for name in others:
            if _kind(stored[name]) != _kind(stored[first]):
                raise UserError(
                    f"the checkpoint's optimizer states of {first} and {name} are not of one run: "
                    f"{_kind(stored[first])} and {_kind(stored[name])}."
                )


def _of_optimizer(weight: StoredWeight) -> Set[str]:
    """Return the names of the moments that an optimizer keeps, without the average that a run may keep beside them."""
    return weight.moments.keys() - {AVERAGE}


def _kind(weight: StoredWeight) -> tuple[list[str], dict[str, float]]:
    return sorted(weight.moments), weight.scalars


def _fill(weights: ShardedWeights, stored: Mapping[str, StoredWeight], progress: _Progress) -> None:
    """Read this rank's ranges of masters and moments. Local."""
    whole = {MOMENTUM} if has_whole_momentums(weights) else set()
    for flat, group in stepped_tensors(weights):
        _fresh_state(weights, flat, group, stored, whole)
    for piece in weights.placement.edit(set(weights.layout)):
        if not piece.master.numel():
            continue
        weight = stored[piece.name]
        weight.master.read_into(piece.master, piece.slice, piece.start)
        progress.add(piece.master.numel())
        state, place = state_of(weights, piece.master)
        for key in weight.moments.keys() - whole:
            goal = state[key].view(-1)[place : place + piece.master.numel()]
            weight.moments[key].read_into(goal, piece.slice, piece.start)
            progress.add(goal.numel())
    if whole:
        for name, part, momentum in fresh_whole_momentums(weights):
            if MOMENTUM in stored[name].moments:
                stored[name].moments[MOMENTUM].read_into(momentum, part, 0)
            progress.add(momentum.numel())
    progress.end()


def _fresh_state(
    weights: ShardedWeights,
    flat: torch.Tensor,
    group: dict[str, Any],
    stored: Mapping[str, StoredWeight],
    left_out: Set[str],
) -> None:
    """Give a flat tensor the optimizer's state that its weights will have, with moments of zero.

    Padding keeps these zeros.
    """
    state = base_optimizer(weights).state[flat]
    kept = _algorithm(weights).of_group(group).moments.keys()
    like = next((each for each in stored.values() if _of_optimizer(each) == kept), None)
    moments = like.moments.keys() - left_out if like else set()
    scalars = like.scalars if like else {}
    for key in state.keys() - moments - scalars.keys():
        del state[key]
    for key in moments:
        if key in state and state[key].shape == flat.shape:
            state[key].zero_()  # DeepSpeed has views of it
        else:
            state[key] = torch.zeros_like(flat, requires_grad=False)
    state.update({key: torch.tensor(value, dtype=torch.float32) for key, value in scalars.items()})


def _count_on(engine: Engine, counters: Counters) -> None:
    """Continue DeepSpeed's counters, and fp16's loss scale where both runs have a dynamic one."""
    engine.global_steps, engine.global_samples = counters.global_steps, counters.global_samples
    engine.skipped_steps = counters.skipped_steps
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        scaler = getattr(engine.optimizer, "loss_scale_config", None) or engine.optimizer.loss_scaler
        vars(scaler).update({key: value for key, value in counters.loss_scale.items() if hasattr(scaler, key)})


class _Progress:
    """Reports how much of its share a rank has read: to the watchdog always, in the log every few seconds."""

    def __init__(self, weights: ShardedWeights, stored: Mapping[str, StoredWeight], say: Callable[[str], None]) -> None:
        """Begin to read the pieces of `weights` from `stored`."""
        sizes = [(piece.name, piece.master.numel()) for piece in weights.pieces()]
        self._total = sum(size * (1 + len(stored[name].moments)) for name, size in sizes)
        self._done, self._say = 0, say
        self._began = self._line = time.monotonic()

    def add(self, elements: int) -> None:
        """Count float32 elements that have been read."""
        enter(current().name)
        self._done += elements
        if time.monotonic() - self._line > _BETWEEN_LINES_S:
            self._line = time.monotonic()
            self._say(f"loading: {_gigabytes(self._done)} of {_gigabytes(self._total)} of this rank's share are read")

    def end(self) -> None:
        """Report the whole."""
        seconds = time.monotonic() - self._began
        self._say(f"read {_gigabytes(self._done)}, this rank's share of the weights and moments, in {seconds:.1f} s")


def _gigabytes(elements: int) -> str:
    return f"{4 * elements / 1e9:.2f} GB"
