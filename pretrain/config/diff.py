"""Differences between two configurations, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMING = {"name", "path"}  # the keys that identify the items of a list


@dataclass(frozen=True)
class Change:
    """One key of the configuration, or value of the environment, that has changed.

    Attributes:
        key: the dotted key.
        was: the value before, as shown to a person.
        now: the value now, as shown to a person.
        effect: the consequence, where it is not obvious.
    """

    key: str
    was: str
    now: str
    effect: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.now}"

    @property
    def with_effect(self) -> str:
        """The change and its consequence."""
        return f"{self}: {self.effect}" if self.effect else str(self)


def flat(value: Any) -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys.

    In a list, methods are identified by their names and the sources of a mixture by their paths.
    """
    return dict(_pairs("", value))


def _pairs(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) and _NAMING & item.keys() for item in value):
        value = {next(item[name] for name in _NAMING if name in item): item for item in value}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _pairs(f"{key}.{name}" if key else name, item)
    else:
        yield key, value
