"""Who among the ranks differs from the others, in words."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


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
