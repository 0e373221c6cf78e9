"""Ranks that must agree: on what they run, at start, and on the weights that they hold, now and then.

Between optimizer steps two things hold in every sharding; memory, a link or a mistake that breaks one of them shows:

    what several ranks hold of one weight       equal, bit for bit, on all data-parallel ranks
    a rank's range of its working copies        the rank's master, rounded to the working precision

    ZeRO stage    held whole by every data-parallel rank     master
    0             masters, and working copies                held whole
    1, 2          working copies                             a range on each rank
    3             working copies of small weights            a range on each rank

Under tensor parallelism the ranks that hold the same slices are compared: rank r with r + N, r + 2 N and so on.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import torch

from pretrain.config.diff import flat
from pretrain.data.json_files import content_hash
from pretrain.distributed.ranks import all_gather_object, on_every_rank
from pretrain.errors import MachineFault, SharedUserError
from pretrain.methods import Method
from pretrain.resilience.digest import bit_digest, differing_elements
from pretrain.sharded import ShardedWeights
from pretrain.sharded.collectives import all_gather
from pretrain.sharded.piece import Piece

Value = TypeVar("Value", bound=Hashable)

_SHOWN = 4  # of what differs, in one message


class RanksDisagree(MachineFault):
    """Ranks hold different values of what must be the same. Raised on every rank, with the same words."""


def check_start(find: Callable[[], Mapping[str, Any]]) -> None:
    """SharedUserError on every rank unless `find` finds the same on each; in a requeued job MachineFault. Collective.

    find: what must be the same, by name, as JSON values; mappings are compared key by key. A UserError that it raises on
    one rank becomes that of all.
    """
    found = on_every_rank(find)
    mine = {f"{name} {key}".strip(): str(value) for name, fact in found.items() for key, value in flat(fact).items()}
    if len(set(all_gather_object(content_hash(mine)))) == 1:
        return
    everyones = all_gather_object(mine)
    keys = dict.fromkeys(key for facts in everyones for key in facts)
    columns = {key: {rank: facts.get(key, "absent") for rank, facts in enumerate(everyones)} for key in keys}
    differences = [
        f"{key}: {who_holds_what(values, _hosts())}" for key, values in columns.items() if _differ(values.values())
    ]
    # A job that has run before got another node now: the next one may do.
    kind = MachineFault if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else SharedUserError
    raise kind(
        f"the ranks do not run the same. {_some(differences, '; ')}. Give every node the same files, environment and "
        "command line, then start again."
    )


@torch.no_grad()
def check_step(weights: ShardedWeights, methods: Sequence[Method], step: int, samples: int, lr: float) -> None:
    """RanksDisagree on every rank unless they are at one place and hold the same. Collective, between optimizer steps.

    The place: `step`, `samples` consumed, learning rate. What they hold: see above; and what methods keep. One pass over
    this rank's weights, no wait for its device before the one all-gather, of at most two numbers for each weight.
    """
    place = dict(zip(("step", "samples", "learning rate"), _as_integers(step, samples, lr), strict=True))
    held = {name: bit_digest(tensor) for name, tensor in _held_whole(weights, methods)}
    stray = {piece.name: _stray_elements(piece, weights) for piece in weights.placement.pieces(set(weights.layout))}
    rows = iter(_everyones((*place.values(), *held.values(), *stray.values()), weights.engine.device))
    of_place, of_held, of_stray = ({name: next(rows) for name in names} for names in (place, held, stray))
    differences = [*_apart(of_place), *_unequal(of_held, weights.placement.tensor_ranks), *_astray(of_stray)]
    if differences:
        raise RanksDisagree(
            f"the ranks disagree after step {step}: {_some(differences, '; ')}. Memory, a link or a device is at fault, "
            "not the input; the same command goes on from the newest checkpoint."
        )


def _held_whole(weights: ShardedWeights, methods: Sequence[Method]) -> Iterator[tuple[str, torch.Tensor]]:
    """What other data-parallel ranks hold as well, by name."""
    engine = weights.engine
    if engine.zero_optimization_stage() == 0:
        yield from ((piece.name, piece.master) for piece in weights.placement.pieces(set(weights.layout)))
    else:
        copies = ((name, _resident(parameter)) for name, parameter in engine.module.named_parameters())
        yield from ((name, copy) for name, copy in copies if copy is not None)
    for method in methods:
        kept = method.state(engine.module)
        yield from ((name, tensor) for name, tensor in kept.items() if tensor is not None)  # None before the first step


def _stray_elements(piece: Piece, weights: ShardedWeights) -> torch.Tensor:
    """How many elements of this rank's working copies of a piece are not its master, rounded; an int64 scalar."""
    parameter, owned = weights.engine.module.get_parameter(piece.name), piece.master.numel()
    copies = [parameter.ds_tensor.data[:owned]] if hasattr(parameter, "ds_tensor") else []
    if (whole := _resident(parameter)) is not None:
        copies.append(whole.view(-1)[piece.start : piece.start + owned])
    return torch.stack([differing_elements(copy, piece.master).to(weights.engine.device) for copy in copies]).amax()


def _resident(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The working copy that holds all of a weight, or of its tensor-parallel slice, between steps; None where none does."""
    cut = hasattr(parameter, "ds_tensor") and parameter.ds_status.name != "AVAILABLE"
    return None if cut else parameter.data


def _everyones(mine: Iterable[int | torch.Tensor], device: torch.device) -> list[list[int]]:
    """For each number of this rank, a list of those of all ranks."""
    return all_gather(torch.stack([torch.as_tensor(number, device=device) for number in mine])).T.tolist()


def _apart(numbers: Mapping[str, list[int]]) -> Iterator[str]:
    for name, everyones in numbers.items():
        if _differ(everyones):
            values = [repr(value).removesuffix(".0") for value in _as_floats(*everyones)]
            yield f"{name}: {who_holds_what(dict(enumerate(values)), _hosts())}"


def _unequal(digests: Mapping[str, list[int]], tensor_ranks: int) -> Iterator[str]:
    """A sentence for each set of ranks that hold something else, with all that they hold otherwise."""
    found: dict[str, list[str]] = {}
    for name, everyones in digests.items():
        for first in range(tensor_ranks):
            alike = dict(list(enumerate(everyones))[first::tensor_ranks])
            if _differ(alike.values()):
                found.setdefault(who_differs(alike, _hosts()), []).append(name)
    for who, names in found.items():
        yield f"different on {who}: {_some(names)}"


def _astray(counts: Mapping[str, list[int]]) -> Iterator[str]:
    """A sentence for each rank whose working copies do not follow its masters."""
    found: dict[int, list[str]] = {}
    for name, everyones in counts.items():
        for rank, count in enumerate(everyones):
            if count:
                found.setdefault(rank, []).append(f"{name} in {count} element{'s' * (count != 1)}")
    for rank, names in found.items():
        yield f"working copy and master differ on {named([rank], _hosts())}: {_some(names)}"


def _differ(values: Iterable[object]) -> bool:
    return len(set(values)) > 1


def _some(parts: Sequence[str], separator: str = ", ") -> str:
    more = len(parts) - _SHOWN
    return separator.join(parts[:_SHOWN]) + f" and {more} more" * (more > 0)


@cache
def _hosts() -> list[str]:
    """Of every rank. Collective the first time, like the disagreement that asks for it."""
    return all_gather_object(socket.gethostname())


def _as_integers(*values: float) -> tuple[int, ...]:
    """The bits of float64 numbers, which hold every step and sample exactly."""
    return struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values))


def _as_floats(*bits: int) -> tuple[float, ...]:
    return struct.unpack(f"{len(bits)}d", struct.pack(f"{len(bits)}q", *bits))


def camps(values: Mapping[int, Value]) -> list[tuple[Value, list[int]]]:
    """The ranks by the value that they hold, the largest camp first; one camp where all agree."""
    found: dict[Value, list[int]] = {}
    for rank, value in values.items():
        found.setdefault(value, []).append(rank)
    return sorted(found.items(), key=lambda camp: (-len(camp[1]), camp[1]))


def has_majority(found: Sequence[tuple[Value, list[int]]]) -> bool:
    """Whether one camp is larger than any other. Two ranks that differ never have one."""
    return len(found) == 1 or len(found[0][1]) > len(found[1][1])


def who_holds_what(values: Mapping[int, Value], hosts: Sequence[str]) -> str:
    """Every value with the ranks that hold it: `0.002 on rank 3 (node1), 0.001 on the 7 others`."""
    found = camps(values)
    parts = [f"{value} on {named(ranks, hosts)}" for value, ranks in found]
    if has_majority(found):
        value, ranks = found[0]
        parts = [*parts[1:], f"{value} on the {len(ranks)} others"]
    return ", ".join(parts)


def who_differs(values: Mapping[int, Value], hosts: Sequence[str]) -> str:
    """The ranks outside the majority: `rank 3 (node1) than on the 7 others`; every camp where there is none."""
    found = camps(values)
    if has_majority(found):
        return f"{named(sorted(set(values) - set(found[0][1])), hosts)} than on the {len(found[0][1])} others"
    camps_named = " than on ".join(named(ranks, hosts) for _, ranks in found)
    return f"{camps_named}, and no majority tells which is right"


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 3 (node1)`, `ranks 3, 8-15 (node1, node2)`. hosts: of every rank."""
    places = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)} ({places})"


def _ranges(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
