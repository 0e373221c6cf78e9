"""Checks of collective calls: a bad one raises the same error on every rank, and neither hangs nor lets weights differ."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

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
    operation: str,
    names: Iterable[str],
    changes: Changes | None = None,
    extra: object = None,
) -> set[str]:
    """Return the names as a set, after checking that every rank makes the same valid call.

    Collective: one all-gather of 32 bytes.

    Args:
        engine: the engine whose weights are asked for.
        layout: its weights by name.
        operation: the name of the operation, for error messages.
        names: the weights that it is called for.
        changes: its (scale, shift) of each weight, if it has them.
        extra: anything else that must be the same on every rank, compared by its `repr`.

    Raises:
        RuntimeError: on every rank, if the call comes between the micro-batches of a step.
        ValueError: on every rank, for an unknown weight, for a factor in `changes` that float32 does not hold, and if
            the calls of the ranks differ.
    """
    wanted = sorted(names)
    complaint = _complaint(engine, layout, wanted, changes or {})
    call = repr((operation, wanted, sorted((changes or {}).items()), extra))
    digest = hashlib.sha256(f"{call}{complaint}".encode()).digest()
    digests = all_gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    if complaint is not None or bool((digests != digests[0]).any()):
        _raise_together(complaint, call, operation, wanted)
    return set(wanted)


def require_known(names: Iterable[str], layout: Mapping[str, Weight]) -> None:
    """Raise ValueError, with the nearest name, for a weight that is not in `layout`."""
    for name in names:
        if name not in layout:
            near = difflib.get_close_matches(name, layout, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"this engine's model has no weight '{name}'{hint}")


def all_gather(mine: torch.Tensor) -> torch.Tensor:
    """Stack the tensors of all ranks. Collective.

    Args:
        mine: this rank's tensor, of one shape and dtype on all ranks.

    Returns:
        `(ranks, *mine.shape)`, of the dtype of `mine`: on the GPU under NCCL, else on the device of `mine`.
    """
    if dist.get_backend() == "nccl":
        mine = mine.cuda()  # NCCL reaches no CPU memory, where an offloaded optimizer keeps its pieces
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered)


def _complaint(engine: Engine, layout: Mapping[str, Weight], names: list[str], changes: Changes) -> Exception | None:
    """Return the error that this rank's call deserves by itself, None for a valid one."""
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


def _raise_together(complaint: Exception | None, call: str, operation: str, names: list[str]) -> NoReturn:
    """Raise the first rank's complaint, or name the first difference between the calls: the same on every rank."""
    calls: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(calls, (complaint, call, operation, names))
    for rank, (theirs, *_) in enumerate(calls):
        if theirs is not None:
            raise type(theirs)(f"{theirs} (rank {rank})")
    _, first_call, first_operation, first_names = calls[0]
    rank, other = next((rank, theirs) for rank, theirs in enumerate(calls) if theirs[1] != first_call)
    _, _, other_operation, other_names = other
    if other_operation != first_operation:
        raise ValueError(f"rank 0 called {first_operation} and rank {rank} called {other_operation}")
    differing = sorted(set(other_names) ^ set(first_names))[:3] or ["other values"]
    raise ValueError(f"rank 0 and rank {rank} called {operation} with different arguments: {', '.join(differing)}")
