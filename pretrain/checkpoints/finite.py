"""Whether a model is one still: neither its weights nor what it computes hold NaN or infinity. If not, no step mends it."""

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
    """Name what is not finite in the masters, in the working copies, or in the probe's logits; None: all is finite.

    moments: of all `weights`, as they are. logits: on the probe, in the precision of the working copies, beyond whose
    range a finite master becomes infinity. Collective, with the same answer on every rank.
    """
    largest = torch.finfo(logits.dtype).max
    suspects = [name for name, found in moments.items() if not sqrt(abs(found.squared_norm)) <= largest]
    tails = weights.statistics(suspects)
    beyond = [name for name, found in tails.items() if not found.absolute_maximum <= largest]
    found = _told(beyond) if beyond else _fault_of_logits(logits)
    return next(filter(None, all_gather_object(found)), None)


def refuse_unless_finite(checkpoint: Path) -> None:
    """UserError for a checkpoint of a model with NaN or infinity. One without a probe is not looked at."""
    if not has_probe(checkpoint):
        return
    bad = [name for name, found in load_moments(checkpoint).items() if not isfinite(found.squared_norm)]
    if fault := _told(bad) if bad else _fault_of_logits(load_probe(checkpoint)[1]):
        raise UserError(f"{checkpoint} holds a model that has diverged: {fault}. Take an older checkpoint.")


def _told(names: Iterable[str]) -> str:
    first, *more = names
    return f"there is NaN or infinity in {first}" + f" and {len(more)} more weights" * bool(more)


def _fault_of_logits(logits: torch.Tensor) -> str | None:
    return None if bool(logits.isfinite().all()) else "its logits on the probe are NaN or infinite"
