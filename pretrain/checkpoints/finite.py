"""Checks that a model has not diverged: neither its weights nor its logits hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, sqrt
from pathlib import Path

import torch

from pretrain.checkpoints.logit_probe import has_probe, load_moments, load_probe
from pretrain.distributed.ranks import all_gather_object
from pretrain.errors import UserError
from pretrain.sharded import Moments, ShardedWeights


def fault_of_model(weights: ShardedWeights, moments: Mapping[str, Moments], logits: torch.Tensor) -> str | None:
    """Name the first fault: NaN or infinity in the masters, the working copies, or the probe's logits. Collective.

    Args:
        weights: the weights of the engine.
        moments: the present moments of all `weights`.
        logits: on the probe, in the precision of the working copies. Beyond its range a finite master becomes infinity.

    Returns:
        A clause for a message, the same on every rank. None if everything is finite.
    """
    largest = torch.finfo(logits.dtype).max
    suspects = [name for name, each in moments.items() if not sqrt(abs(each.squared_norm)) <= largest]
    tails = weights.statistics(suspects)
    beyond = [name for name, each in tails.items() if not each.absolute_maximum <= largest]
    fault = _fault_of_weights(beyond) if beyond else _fault_of_logits(logits)
    return next(filter(None, all_gather_object(fault)), None)


def refuse_unless_finite(checkpoint: Path) -> None:
    """Raise UserError for a checkpoint of a model with NaN or infinity. A checkpoint without a probe is not checked."""
    if not has_probe(checkpoint):
        return
    bad = [name for name, each in load_moments(checkpoint).items() if not isfinite(each.squared_norm)]
    if fault := _fault_of_weights(bad) if bad else _fault_of_logits(load_probe(checkpoint)[1]):
        raise UserError(f"{checkpoint} holds a model that has diverged: {fault}. Take an older checkpoint.")


def _fault_of_weights(names: Iterable[str]) -> str:
    first, *more = names
    others = f" and {len(more)} more weights" if more else ""
    return f"there is NaN or infinity in {first}{others}"


def _fault_of_logits(logits: torch.Tensor) -> str | None:
    return None if bool(logits.isfinite().all()) else "its logits on the probe are NaN or infinite"
