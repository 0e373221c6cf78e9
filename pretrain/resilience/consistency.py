"""Checks that all ranks run the same, at start, and hold the same weights, at intervals.

Between optimizer steps two things hold in every sharding. A fault of memory, of a link or of the code that breaks one of
them is found:

    parts of a weight that several ranks hold   equal, bit for bit, on all data-parallel ranks
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from pretrain.config.diff import flat
from pretrain.data.json_files import content_hash
from pretrain.distributed.rank_names import named, who_differs, who_holds_what
from pretrain.distributed.ranks import all_gather_object, on_every_rank
from pretrain.errors import MachineFault, SharedUserError
from pretrain.methods import Method
from pretrain.resilience.digest import bit_digest, differing_elements
from pretrain.sharded import ShardedWeights
from pretrain.sharded.collectives import all_gather
from pretrain.sharded.piece import Piece
from pretrain.sharded.working_copies import resident_copy, working_copies

_SHOWN = 4  # differences in one message


class RanksDisagree(MachineFault):
    """Ranks hold different values where they must be equal. Raised on every rank, with the same message."""


def check_start(find: Callable[[], Mapping[str, Any]]) -> None:
    """Compare values that must be the same on all ranks. Collective.

    Args:
        find: returns the values by name, as JSON. Mappings are compared key by key. A UserError that it raises on one rank
            is raised on all.

    Raises:
        SharedUserError: on every rank, if a value differs.
        MachineFault: the same in a requeued job, whose next start may get other nodes.
    """
    values = on_every_rank(find)
    mine = {f"{name} {key}".strip(): str(part) for name, value in values.items() for key, part in flat(value).items()}
    if len(set(all_gather_object(content_hash(mine)))) == 1:
        return
    everyones = all_gather_object(mine)
    keys = dict.fromkeys(key for theirs in everyones for key in theirs)
    columns = {key: {rank: theirs.get(key, "absent") for rank, theirs in enumerate(everyones)} for key in keys}
    differences = [
        f"{key}: {who_holds_what(column, _hosts())}" for key, column in columns.items() if _differ(column.values())
    ]
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    kind = MachineFault if requeued else SharedUserError
    raise kind(
        f"the ranks do not run the same. {_some(differences, '; ')}. Give every node the same files, environment and "
        "command line, then start again."
    )


@torch.no_grad()
def check_step(weights: ShardedWeights, methods: Sequence[Method], step: int, samples: int, lr: float) -> None:
    """Check that all ranks are at the same place and hold the same weights. Collective, between optimizer steps.

    It takes one pass over this rank's weights, and one all-gather of at most two numbers for each weight, without waiting
    for the device before.

    Args:
        weights: the weights of the engine.
        methods: the methods of the run, whose state is compared too.
        step: optimizer steps done.
        samples: samples of the run's order consumed.
        lr: the learning rate of the step.

    Raises:
        RanksDisagree: on every rank.
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
            "not the input; the same command continues from the newest checkpoint."
        )


def _held_whole(weights: ShardedWeights, methods: Sequence[Method]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that other data-parallel ranks hold as well, by name."""
    engine = weights.engine
    if engine.zero_optimization_stage() == 0:
        yield from ((piece.name, piece.master) for piece in weights.placement.pieces(set(weights.layout)))
    else:
        copies = ((name, resident_copy(parameter)) for name, parameter in engine.module.named_parameters())
        yield from ((name, copy) for name, copy in copies if copy is not None)
    for method in methods:
        yield from method.state(engine.module).items()


def _stray_elements(piece: Piece, weights: ShardedWeights) -> torch.Tensor:
    """Count the elements of this rank's working copies of a piece that are not its master, rounded: an int64 scalar."""
    copies = working_copies(weights.engine.module.get_parameter(piece.name), piece)
    return torch.stack([differing_elements(copy, piece.master).to(weights.engine.device) for copy in copies]).amax()


def _everyones(mine: Iterable[int | torch.Tensor], device: torch.device) -> list[list[int]]:
    """Return, for each number of this rank, the list of all ranks' numbers."""
    return all_gather(torch.stack([torch.as_tensor(number, device=device) for number in mine])).T.tolist()


def _apart(numbers: Mapping[str, list[int]]) -> Iterator[str]:
    for name, everyones in numbers.items():
        if _differ(everyones):
            values = [repr(value).removesuffix(".0") for value in _as_floats(*everyones)]
            yield f"{name}: {who_holds_what(dict(enumerate(values)), _hosts())}"


def _unequal(digests: Mapping[str, list[int]], tensor_ranks: int) -> Iterator[str]:
    """Yield a clause for each set of ranks that differ, with the weights that they hold differently."""
    names_of: dict[str, list[str]] = {}
    for name, everyones in digests.items():
        for first in range(tensor_ranks):
            compared = dict(list(enumerate(everyones))[first::tensor_ranks])
            if _differ(compared.values()):
                names_of.setdefault(who_differs(compared, _hosts()), []).append(name)
    for who, names in names_of.items():
        yield f"different on {who}: {_some(names)}"


def _astray(counts: Mapping[str, list[int]]) -> Iterator[str]:
    """Yield a clause for each rank whose working copies differ from its masters."""
    faults_of: dict[int, list[str]] = {}
    for name, everyones in counts.items():
        for rank, count in enumerate(everyones):
            if count:
                noun = "element" if count == 1 else "elements"
                faults_of.setdefault(rank, []).append(f"{name} in {count} {noun}")
    for rank, faults in faults_of.items():
        yield f"working copy and master differ on {named([rank], _hosts())}: {_some(faults)}"


def _differ(values: Iterable[object]) -> bool:
    return len(set(values)) > 1


def _some(parts: Sequence[str], separator: str = ", ") -> str:
    shown, more = separator.join(parts[:_SHOWN]), len(parts) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


@cache
def _hosts() -> list[str]:
    """Return the host of every rank. Collective at the first call: every rank finds the same disagreement."""
    return all_gather_object(socket.gethostname())


def _as_integers(*values: float) -> tuple[int, ...]:
    """Return the bits of float64 numbers, which hold every step and sample exactly."""
    return struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values))


def _as_floats(*bits: int) -> tuple[float, ...]:
    return struct.unpack(f"{len(bits)}d", struct.pack(f"{len(bits)}q", *bits))
