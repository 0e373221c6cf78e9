"""Names ranks in messages: those that hold one value, and those that differ from the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)
Camps = list[tuple[Value, list[int]]]


def camps(values: Mapping[int, Value]) -> Camps[Value]:
    """Return the ranks by the value that they hold, the largest camp first."""
    ranks_of: dict[Value, list[int]] = {}
    for rank, value in values.items():
        ranks_of.setdefault(value, []).append(rank)
    return sorted(ranks_of.items(), key=lambda camp: (-len(camp[1]), camp[1]))


def has_majority(found: Camps[Value]) -> bool:
    """Return whether one camp is larger than any other. Two ranks that differ have no majority."""
    return len(found) == 1 or len(found[0][1]) > len(found[1][1])


def who_holds_what(values: Mapping[int, Value], hosts: Sequence[str]) -> str:
    """Return every value with the ranks that hold it: `0.002 on rank 3 (node1), 0.001 on the 7 others`.

    Args:
        values: the value of each rank.
        hosts: the host of each rank.
    """
    found = camps(values)
    parts = [f"{value} on {named(ranks, hosts)}" for value, ranks in found]
    if has_majority(found):
        value, ranks = found[0]
        parts = [*parts[1:], f"{value} on the {len(ranks)} others"]
    return ", ".join(parts)


def who_differs(values: Mapping[int, Value], hosts: Sequence[str]) -> str:
    """Return the ranks outside the majority: `rank 3 (node1) than on the 7 others`; every camp if there is none.

    Args:
        values: the value of each rank.
        hosts: the host of each rank.
    """
    found = camps(values)
    if has_majority(found):
        return f"{named(sorted(set(values) - set(found[0][1])), hosts)} than on the {len(found[0][1])} others"
    camps_named = " than on ".join(named(ranks, hosts) for _, ranks in found)
    return f"{camps_named}, and no majority shows which is right"


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return `rank 3 (node1)` or `ranks 3, 8-15 (node1, node2)`.

    Args:
        ranks: the ranks to name, ascending.
        hosts: the host of each rank of the run.
    """
    places = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
    noun = "ranks" if len(ranks) > 1 else "rank"
    return f"{noun} {', '.join(spans(ranks))} ({places})"


def spans(ranks: Sequence[int]) -> list[str]:
    """Return ascending numbers as spans: `['0', '2-5']`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
