"""pydantic's findings as lines for people: the place, the full key, what is wrong, the nearest valid key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pretrain.run_file import RunFile


def explain(mistake: ErrorDetails, root: type[BaseModel], file: RunFile) -> str:
    """One line for one validation error of `file.data` against the schema `root`."""
    keys, section = _follow(mistake["loc"], root, file.data)
    key = ".".join(keys)
    where = file.where(key)
    if mistake["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'; {_nearest(key, section, root)}"
    if mistake["type"].startswith("union_tag"):
        return f"{where}: {key}: {_unknown_tag(mistake['ctx'])}"
    message = mistake["msg"].removeprefix("Value error, ")
    got = "" if isinstance(mistake["input"], dict | BaseModel) else f" (got {mistake['input']!r})"
    return f"{where}: {key}: {message}{got}" if key else f"{where}: {message}"


def _follow(location: tuple, root: type[BaseModel], data: Any) -> tuple[list[str], type[BaseModel] | None]:
    """The keys of pydantic's location, and the section that holds the last one.

    pydantic puts the tag of a chosen union member (a model family, a method) between the keys; it is no key.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = root
    members: list[type[BaseModel]] = [root]
    for part in location:
        tagged = [member for member in members if len(members) > 1 and _tag(member) == part]
        if tagged:
            members = tagged
            continue
        keys.append(str(part))
        if isinstance(part, str):
            section = members[0] if len(members) == 1 else None
            field = section.model_fields.get(part) if section else None
            members = _sections_in(field.annotation) if field else []
    return keys, section


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, also inside lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in _sections_in(part)]


def _tag(section: type[BaseModel]) -> Any:
    """The value that picks this section from a union: the only one that its first literal field allows."""
    literals = (field.annotation for field in section.model_fields.values() if _is_literal(field.annotation))
    return next((typing.get_args(literal)[0] for literal in literals if len(typing.get_args(literal)) == 1), None)


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _nearest(key: str, section: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """The nearest valid key, or else the keys that are valid there."""
    prefix, _, last = key.rpartition(".")
    here = list(section.model_fields) if section else []
    if near := difflib.get_close_matches(last, here, 1, 0.6):
        return f"did you mean '{prefix}{'.' if prefix else ''}{near[0]}'?"
    if elsewhere := [valid for valid in _all_keys(root) if valid.rpartition(".")[2] == last]:
        return f"did you mean '{elsewhere[0]}'?"
    return f"valid here: {', '.join(here)}"


def _unknown_tag(context: dict[str, Any]) -> str:
    name = context["discriminator"].strip("'")
    if "tag" not in context:
        return f"its '{name}' is missing"
    valid = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
    near = difflib.get_close_matches(str(context["tag"]), valid, 1, 0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(valid)}"
    return f"unknown {name} '{context['tag']}'; {hint}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
