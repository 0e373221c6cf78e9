"""Differences between two configurations, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMING = {"name", "path"}  # the key that tells the items of a list apart


@dataclass(frozen=True)
class Change:
    """One key of the configuration, or fact of the environment, with the values before and now, as shown to a person.

    effect: what follows from it, where that is not plain.
    """

    key: str
    was: str
    now: str
    effect: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.now}"

    @property
    def with_effect(self) -> str:
        return f"{self}: {self.effect}" if self.effect else str(self)


def flat(value: Any) -> dict[str, Any]:
    """Dotted keys of nested mappings; the methods of a list go by their names, the sources of a mixture by their paths."""
    return dict(_pairs("", value))


def _pairs(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) and _NAMING & item.keys() for item in value):
        value = {next(item[name] for name in _NAMING if name in item): item for item in value}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _pairs(f"{key}.{name}" if key else name, item)
    else:
        yield key, value
