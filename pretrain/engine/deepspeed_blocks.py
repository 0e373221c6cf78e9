"""Blocks of DeepSpeed's JSON, read as DeepSpeed itself reads them, with error messages that name the key."""

from __future__ import annotations

from math import isfinite
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.errors import UserError

Kinds = tuple[type | str, ...]


def block(given: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return the block called `name`, empty where there is none.

    Args:
        given: the JSON's content.
        name: the block's key.
        source: a name of the JSON for messages.

    Raises:
        UserError: the value is no block of keys.
    """
    content = given.get(name, {})
    if not isinstance(content, dict):
        raise UserError(f"{source}: {name} must be a block of keys, not {content!r}.")
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{source}: {name} has the key {key!r}, which is no text: JSON has no other keys.")
    return content


def check_kind(value: Any, kinds: Kinds, name: str) -> None:
    """Raise UserError unless `value` has one of these types, or is one of these texts. Booleans are no numbers."""
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    if value in kinds or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
        return
    names: dict[Kinds, str] = {(bool,): "true or false", (dict,): "a block of keys", (int, float): "a number"}
    wanted = names.get(kinds)
    raise UserError(f"{name} must be {wanted or ' or '.join(map(repr, kinds))}, not {value!r}.")


def check_finite(value: Any, name: str) -> None:
    """Raise UserError, with the full name, for NaN or infinity at any depth of `value`."""
    if isinstance(value, float) and not isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_finite(inner, f"{name}: {key}")
    if isinstance(value, list):
        for inner in value:
            check_finite(inner, name)


def parse(block_class: type[BaseModel], content: dict[str, Any], name: str, source: str) -> Any:
    """Return `content` as an instance of DeepSpeed's own `block_class`.

    Raises:
        UserError: that class refuses the content, or a boolean stands for a number.
    """
    try:
        parsed = block_class(**content)
    except ValidationError as error:
        mistakes = "; ".join(".".join(map(str, (name, *e["loc"]))) + f": {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: {mistakes}.") from error
    for key, given in content.items():
        taken = getattr(parsed, key, None)
        if isinstance(taken, bool | int | float) and given not in (None, "auto"):
            check_kind(given, (bool,) if isinstance(taken, bool) else (int, float), f"{source}: {name}.{key}")
    return parsed
