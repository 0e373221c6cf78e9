"""Pairs of methods that a run refuses, and those that it can be made to take.

A pair is refused for one of two reasons:

- arithmetic: one of the two would have no effect, or both write down the same value, or no export can hold the result
  (`decides`, `conflicts`). Nothing can be made of it.
- science: the run is well defined, and results or derivations speak against it (`discouraged`). Whoever wants to measure
  just that lists the pair under `allow`, with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from pretrain.methods.base import Method

_ENTRY = re.compile(r"\s*(\w+)\s*\+\s*(\w+)\s*:\s*(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Clash:
    """A pair of methods that is refused.

    Attributes:
        methods: their names.
        reason: why, as the end of a sentence.
        scientific: whether the pair can be allowed.
    """

    methods: frozenset[str]
    reason: str
    scientific: bool


@dataclass(frozen=True)
class Allowed:
    """An entry of `allow`: a pair, and why the run takes it all the same."""

    methods: frozenset[str]
    because: str


def clashes_of(methods: Sequence[Method]) -> list[Clash]:
    """Return every pair of methods that is refused unless it is allowed."""
    found = (_clash(first, second) for first, second in combinations(methods, 2))
    return [clash for clash in found if clash is not None]


def allowed_in(entries: Iterable[str]) -> list[Allowed]:
    """Return what the entries of `allow` say.

    Raises:
        ValueError: one is not of the form "one + other: reason". The message is a sentence.
    """
    return [_read(entry) for entry in entries]


def decisions_that_clash(methods: Sequence[Method], allowed: Iterable[Allowed] = ()) -> list[str]:
    """Return a sentence for each pair of methods that cannot be combined, without those that are allowed."""
    forced = {entry.methods for entry in allowed}
    return [
        _sentence(clash, methods) for clash in clashes_of(methods) if not (clash.scientific and clash.methods in forced)
    ]


def allowed_in_vain(methods: Sequence[Method], allowed: Iterable[Allowed]) -> list[str]:
    """Return a sentence for each pair that is allowed and need not be, or cannot be."""
    clashes, faults, seen = {clash.methods: clash for clash in clashes_of(methods)}, [], set()
    for entry in allowed:
        names, clash = " + ".join(sorted(entry.methods)), clashes.get(entry.methods)
        if absent := sorted(entry.methods - {method.name for method in methods}):
            faults.append(f"'{names}' is not a pair of this run, which does not list {' or '.join(absent)}")
        elif clash is None:
            faults.append(f"'{names}' is refused nowhere: remove the entry")
        elif not clash.scientific:
            faults.append(f"'{names}' cannot be allowed, because the two contradict each other: {clash.reason}")
        elif entry.methods in seen:
            faults.append(f"'{names}' is listed twice: keep one entry, with one reason")
        seen.add(entry.methods)
    return faults


def _clash(first: Method, second: Method) -> Clash | None:
    names = frozenset({first.name, second.name})
    reason = first.conflicts.get(second.name) or second.conflicts.get(first.name)
    if reason is None and (both := first.decides & second.decides):
        reason = f"both decide {', '.join(sorted(both))}: keep one of them"
    if reason is not None:
        return Clash(names, reason, scientific=False)
    reason = first.discouraged.get(second.name) or second.discouraged.get(first.name)
    return None if reason is None else Clash(names, reason, scientific=True)


def _sentence(clash: Clash, methods: Sequence[Method]) -> str:
    first, second = (method.name for method in methods if method.name in clash.methods)
    sentence = f"methods {first} and {second} cannot be combined: {clash.reason}"
    if not clash.scientific:
        return sentence
    return f'{sentence}. To train them together all the same, say why: allow: ["{first} + {second}: the reason"]'


def _read(entry: str) -> Allowed:
    found = _ENTRY.fullmatch(entry)
    if found is None or found[1] == found[2]:
        raise ValueError(
            f"'{entry}' does not name a pair and a reason: write 'one_method + other_method: why this run takes both'"
        )
    return Allowed(frozenset({found[1], found[2]}), " ".join(found[3].split()))
