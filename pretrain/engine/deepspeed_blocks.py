"""Blocks of DeepSpeed's JSON, read as DeepSpeed itself reads them, with errors for people."""

from __future__ import annotations

from math import isfinite
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.errors import UserError


def block(given: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """The block called `name`, empty where there is none. UserError, which names the `source`, if it is no block."""
    found = given.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{source}: {name} must be a block of keys, not {found!r}.")
    for key in found:
        if not isinstance(key, str):
            raise UserError(f"{source}: {name} has the key {key!r}, which is no text: JSON has no other keys.")
    return found


def check_kind(value: Any, kinds: tuple, name: str) -> None:
    """UserError unless `value` is of one of these types, or is one of these texts; true and false are no numbers."""
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    if value in kinds or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
        return
    wanted = {(bool,): "true or false", (dict,): "a block of keys", (int, float): "a number"}.get(kinds)
    raise UserError(f"{name} must be {wanted or ' or '.join(map(repr, kinds))}, not {value!r}.")


def check_finite(value: Any, name: str) -> None:
    """UserError, which gives the full name, for a number that is none, at any depth."""
    if isinstance(value, float) and not isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}.")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        check_finite(inner, f"{name}: {key}" if isinstance(value, dict) else name)


def parse(block_class: type[BaseModel], content: dict[str, Any], name: str, source: str) -> Any:
    """`content` as DeepSpeed's own `block_class`. UserError for whatever that class refuses, and booleans for numbers."""
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
