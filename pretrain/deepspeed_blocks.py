"""Blocks of DeepSpeed's JSON, read as DeepSpeed itself reads them, with errors for people."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.errors import UserError


def block(given: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """The block called `name`, empty where there is none. UserError, which names the `source`, if it is no block."""
    found = given.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{source}: {name} must be a block of keys, not {found!r}.")
    return found


def parse(block_class: type[BaseModel], content: dict[str, Any], name: str, source: str) -> Any:
    """`content` as DeepSpeed's own `block_class`. UserError for whatever that class refuses."""
    try:
        return block_class(**content)
    except ValidationError as error:
        mistakes = "; ".join(".".join(map(str, (name, *e["loc"]))) + f": {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: {mistakes}.") from error
