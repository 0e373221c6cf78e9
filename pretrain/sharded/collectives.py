"""What a bad call gets: the same clear error on every rank, instead of a hang or weights that differ between ranks."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pretrain.sharded.engine_protocol import Engine

if TYPE_CHECKING:
    from pretrain.model.layout import Weight

FLOAT32_MAX = torch.finfo(torch.float32).max

Changes = Mapping[str, tuple[float, float]]


def check_call(
    engine: Engine,
    layout: Mapping[str, Weight],
    what: str,
    names: Iterable[str],
    changes: Changes | None = None,
    also: object = None,
) -> set[str]:
    """The names as a set, once it is sure that the call is right on every rank; one collective of 32 bytes.

    what: the operation, as the caller knows it. also: anything else that must be the same on every rank, by its `repr`.

    Raises, on every rank: RuntimeError between the micro-batches of a step; ValueError for an unknown weight, a factor
    in `changes` that float32 does not hold, or ranks that called different things.
    """
    wanted = sorted(names)
    complaint = _complaint(engine, layout, wanted, changes or {})
    asked = repr((what, wanted, sorted((changes or {}).items()), also))
    state = hashlib.sha256(f"{asked}{complaint}".encode()).digest()
    states = all_gather(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    if complaint is not None or bool((states != states[0]).any()):
        _raise_together(complaint, asked, what, wanted)
    return set(wanted)


def require_known(names: Iterable[str], layout: Mapping[str, Weight]) -> None:
    """Raise ValueError, with the nearest name, for a weight that is not in `layout`."""
    for name in names:
        if name not in layout:
            near = difflib.get_close_matches(name, layout, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"this engine's model has no weight '{name}'{hint}")


def all_gather(mine: torch.Tensor) -> torch.Tensor:
    """(ranks, ...) from each rank's tensor of the same shape, on the device that the ranks talk through."""
    if dist.get_backend() == "nccl":
        mine = mine.cuda()  # an offloaded optimizer keeps its pieces on the CPU
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered)


def _complaint(engine: Engine, layout: Mapping[str, Weight], names: list[str], changes: Changes) -> Exception | None:
    if engine.micro_steps % engine.gradient_accumulation_steps():
        return RuntimeError("weights were asked for in the middle of gradient accumulation, not between steps")
    try:
        require_known(names, layout)
    except ValueError as error:
        return error
    for name, factors in changes.items():
        if not all(abs(factor) <= FLOAT32_MAX for factor in factors):  # NaN compares as false
            return ValueError(f"weight '{name}' cannot be rescaled by (scale, shift) = {factors}")
    return None


def _raise_together(complaint: Exception | None, asked: str, what: str, names: list[str]) -> None:
    calls: list = [None] * dist.get_world_size()
    dist.all_gather_object(calls, (complaint, asked, what, names))
    for rank, (theirs, *_) in enumerate(calls):
        if theirs is not None:
            raise type(theirs)(f"{theirs} (rank {rank})")
    first = calls[0]
    rank, other = next((rank, call) for rank, call in enumerate(calls) if call[1] != first[1])
    if other[2] != first[2]:
        raise ValueError(f"rank 0 called {first[2]} and rank {rank} called {other[2]}")
    differing = sorted(set(other[3]) ^ set(first[3]))[:3] or ["other values"]
    raise ValueError(f"rank 0 and rank {rank} called {what} with different arguments: {', '.join(differing)}")
