"""pydantic's errors as lines for people: the place, the full key, the mistake, the nearest valid key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails

from pretrain.config.yaml_file import Origin, RunFile, is_text


def explain(mistake: ErrorDetails, root: type[BaseModel], file: RunFile) -> str:
    """Return one line for one validation error of `file.data` against the schema `root`."""
    keys, section, members = _follow(mistake["loc"], root)
    kind, given = mistake["type"], mistake["input"]
    if kind == "at_key":
        keys.append(mistake["ctx"]["key"])
        given = None
    key, message = ".".join(keys), mistake["msg"].removeprefix("Value error, ")
    if not key:
        return f"{file.where('methods' if message.startswith('method') else key)}: {message}"
    where = file.where(key)
    if kind == "missing":
        return f"{where}: the key '{key}' is missing"
    if kind == "extra_forbidden":
        hint = getattr(section, "elsewhere", {}).get(keys[-1]) or _nearest(key, section, root)
        return f"{where}: unknown key '{key}'; {hint}"
    if kind.startswith("union_tag"):
        return f"{where}: {key}: {_unknown_tag(mistake['ctx'], root)}"
    if kind in ("model_type", "model_attributes_type"):
        message = f"give a mapping {_example(given, members)}"
    elif kind == "tuple_type":
        message = f"give a list, such as [{_tagged(given, members)}]" if members else "give a list"
    if kind == "at_key" or isinstance(given, dict | BaseModel):
        return f"{where}: {key}: {message}"
    origin = file.origins.get(key)
    return f"{where}: {key}: {message} (got {_as_written(given, origin)}){_as_read(kind, given, origin)}"


def _as_written(given: Any, origin: Origin | None) -> str:
    """Return a value as it is written in the file, if it is on one line there."""
    if origin is None or origin.text is None or isinstance(given, list | tuple):
        return repr(list(given) if isinstance(given, tuple) else given)
    return repr(origin.text) if origin.quoted or isinstance(given, str) else origin.text or "nothing"


def _as_read(kind: str, given: Any, origin: Origin | None) -> str:
    """Explain why YAML reads another kind of value than was meant, and what to write instead. Empty where it does not."""
    if origin is None or not origin.text:
        return ""
    if kind == "string_type":
        read = {bool: str(given).lower(), type(None): "nothing"}.get(type(given), f"the number {given}")
        return f": YAML reads {origin.text} as {read}; for the text write it in quotes"
    if isinstance(given, str) and kind in ("int_type", "float_type", "bool_type"):
        if not origin.quoted and re.fullmatch(r"[-+]?0\d+", given):
            return f": a leading 0 means base 8 to some readers of YAML; write {int(given)}"
        if not origin.quoted and ":" in given:
            return ": some readers of YAML take this for a number in base 60; write it out"
        if not is_text(given):
            return ": a text, because of the quotes; leave them out"
    return ""


def _follow(
    location: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None, list[type[BaseModel]]]:
    """Return the keys of pydantic's location, the section that holds the last one, and the sections that it may be itself.

    Between the keys pydantic puts the tag of a chosen union member (a model family, a method), which is left out.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = root
    members: list[type[BaseModel]] = [root]
    forms: set[str] = set()  # names of the forms that the last field may have, a number or a mapping
    for part in location:
        if part in forms:
            forms = set()
            continue
        tagged = [member for member in members if len(members) > 1 and _tag(member) == part]
        if tagged:
            members = tagged
            continue
        keys.append(str(part))
        if isinstance(part, str):
            section = members[0] if len(members) == 1 else None
            field = section.model_fields.get(part) if section else None
            members = sections_in(field.annotation) if field else []
            forms = set(_forms_in(field.annotation)) if field else set()
    return keys, section, members


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold, also inside lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in sections_in(part)]


def _forms_in(annotation: Any) -> Iterator[str]:
    """Yield pydantic's tags of the forms that a field may have."""
    for part in typing.get_args(annotation):
        if isinstance(part, Tag):
            yield part.tag
        yield from _forms_in(part)


def _tag_key(section: type[BaseModel]) -> str | None:
    """Return the key whose value selects this section in a union: its first literal field that allows only one."""
    return next((key for key, field in section.model_fields.items() if len(_choices(field.annotation)) == 1), None)


def _tag(section: type[BaseModel]) -> Any:
    """Return the value of that key."""
    key = _tag_key(section)
    return _choices(section.model_fields[key].annotation)[0] if key else None


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values that a literal allows, none for another annotation."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _example(given: Any, members: list[type[BaseModel]]) -> str:
    """Describe the mapping that should have been given instead of something else."""
    if len(members) == 1:
        return f"of the keys {', '.join(members[0].model_fields)}"
    return f"such as {_tagged(given, members)}"


def _tagged(given: Any, members: list[type[BaseModel]]) -> str:
    """Return a member of the union as it is written in YAML: the one that `given` seems to mean, if it names one."""
    key = _tag_key(members[0])
    named = given.get(key) if isinstance(given, dict) else given
    meant = _normal(named) if isinstance(named, str) else None
    return f"{{{key}: {meant if meant in map(_tag, members) else '...'}}}"


def _nearest(key: str, section: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """Return a hint: the key of this name elsewhere, the nearest valid key, or else the keys that are valid there."""
    prefix, _, last = key.rpartition(".")
    here = list(section.model_fields) if section else []
    elsewhere = next((valid for valid in _all_keys(root) if valid.rpartition(".")[2] == last), None)
    # At the top a key is more often forgotten in its section than misspelt as the name of another.
    near = difflib.get_close_matches(last, here, 1, 0.6) if section is not root or not elsewhere else []
    if near:
        return f"did you mean '{prefix}{'.' if prefix else ''}{near[0]}'?"
    guess = f"did you mean '{elsewhere}'?" if elsewhere else ""
    if guess and section is root:
        return guess
    return f"{guess} valid here: {', '.join(here)}".strip()


def _unknown_tag(context: dict[str, Any], root: type[BaseModel]) -> str:
    """Explain a missing or unknown name of a union's member."""
    name = context["discriminator"].strip("'")
    if "tag" not in context:
        return f"its '{name}' is missing"
    given, valid = str(context["tag"]), [tag.strip(" '") for tag in context["expected_tags"].split(",")]
    near = difflib.get_close_matches(_normal(given), valid, 1, 0.5)
    elsewhere = next((key for key, choices in _all_choices(root) if _normal(given) in choices), None)
    if elsewhere and _normal(given) not in valid:
        hint = f"it is chosen by another key: '{elsewhere}: {_normal(given)}'"
    else:
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(valid)}"
    return f"unknown {name} '{given}'; {hint}"


def _normal(name: str) -> str:
    """Return `name` in the spelling of names here."""
    return name.casefold().replace("-", "_")


def _all_choices(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield every key outside of lists whose values are literals, with these values."""
    for name, field in section.model_fields.items():
        if choices := _choices(field.annotation):
            yield prefix + name, choices
        if typing.get_origin(field.annotation) is not tuple:
            for inner in sections_in(field.annotation):
                yield from _all_choices(inner, f"{prefix}{name}.")


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a section and of the plain sections below it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
