"""What the run file asks of a resumed run that it did not ask of the run that wrote the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import Config
from pretrain.errors import UserError

_SECTIONS = ("data", "methods", "optim", "init")


def changes(checkpoint: Path, config: Config) -> list[str]:
    """The keys of data, methods, optimizer and initialization that differ, with both values. UserError if they cannot be read."""
    path = checkpoint / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_bytes())
        was = flat({section: stored.get(section) for section in _SECTIONS})
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    now = config.model_dump(mode="json")
    found = flat({section: now[section] for section in _SECTIONS})
    return [
        f"{key}: {_shown(was, key)} -> {_shown(found, key)}"
        for key in dict.fromkeys([*was, *found])
        if was.get(key) != found.get(key)
    ]


def _shown(values: dict[str, Any], key: str) -> Any:
    return values.get(key, "absent")


def flat(value: Any) -> dict[str, Any]:
    """Dotted keys of nested mappings; the methods of a list go by their names."""
    return dict(_pairs("", value))


def _pairs(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        value = {item["name"]: item for item in value}
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _pairs(f"{key}.{name}" if key else name, item)
    else:
        yield key, value
