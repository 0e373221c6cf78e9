"""The page of all configuration keys, made from the pydantic models that read a run file.

Types, bounds and defaults are those of the fields. What a key means stands under `Attributes:` in the docstring of its
section. A key without an entry there is a warning, which the strict build refuses.
"""

from __future__ import annotations

import inspect
import json
import logging
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pretrain.config.schema import Config
from pretrain.methods import REGISTRY
from pretrain.methods.base import Method
from pretrain.paths import expanded, local
from pretrain.values import Values

PAGE = "reference/configuration.md"
INTRODUCTION = """# Configuration keys

Every key of a run file, with its type, bounds and default. [Run files](../configuration.md) shows a whole file and
explains how values, paths and `extends` are read. This page is made from the models that read a run file.
"""
METHODS = """## methods

A list of mappings. `name` selects the method, the other keys are its options. [Methods](../methods.md) says what each
method does.
"""
WORDS = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", dict: "mapping", Any: "any value"}
log = logging.getLogger("mkdocs.hooks.configuration_reference")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Return the page in Markdown."""
    sections = [INTRODUCTION, _section("The run", Config)]
    for path, section in _sections_below(Config):
        sections.append(_section(path, section))
    sections.append(METHODS)
    for name, method in sorted(REGISTRY.items()):
        sections.append(_section(name, method, level=3))
    return "\n".join(sections)


def _sections_below(section: type[Values], path: str = "") -> Iterator[tuple[str, type[Values]]]:
    """Yield (path of the key, section) for each section within `section`, except the methods."""
    for key, field in section.model_fields.items():
        for inner in _values_in(field.annotation):
            if issubclass(inner, Method):
                continue
            yield f"{path}{key}{_kind_of(inner)}", inner
            yield from _sections_below(inner, f"{path}{key}.")


def _values_in(annotation: Any) -> list[type[Values]]:
    """Return the sections that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Values):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _values_in(argument)]


def _kind_of(section: type[Values]) -> str:
    """Return what selects this section where a key allows several: ", family: llama"."""
    for key in ("family", "distribution"):
        if key in section.model_fields and get_origin(section.model_fields[key].annotation) is Literal:
            return f", {key}: {get_args(section.model_fields[key].annotation)[0]}"
    return ""


def _section(title: str, section: type[Values], level: int = 2) -> str:
    """Return a heading, the section's description and the table of its keys."""
    text, meanings = _docstring(section)
    described = [_row(key, field, meanings) for key, field in section.model_fields.items() if key != "name" or not issubclass(section, Method)]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *described] if described else ["It has no options."]
    return "\n".join([f"{'#' * level} {title}", "", text, "", *table, ""])


def _docstring(section: type[Values]) -> tuple[str, dict[str, str]]:
    """Return the text of a section's docstring, and what it says about each key, those of its bases included."""
    text, meanings = "", {}
    for part in reversed([base for base in section.__mro__ if issubclass(base, Values) and base is not Values]):
        if "__doc__" not in vars(part) or not part.__doc__:
            continue
        parsed = griffe.Docstring(inspect.cleandoc(part.__doc__), lineno=1).parse("google")
        texts = [piece.value for piece in parsed if piece.kind is griffe.DocstringSectionKind.text]
        text = "\n\n".join(texts) if part is not Method else ""
        for piece in parsed:
            if piece.kind is griffe.DocstringSectionKind.attributes:
                meanings |= {attribute.name: " ".join(attribute.description.split()) for attribute in piece.value}
    return text, meanings


def _row(key: str, field: FieldInfo, meanings: dict[str, str]) -> str:
    meaning = meanings.get(key, "")
    return f"| `{key}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, Values):
        return ""
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Return a type with its bounds, in words."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _type(inner, [*more, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(argument, metadata) for argument in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return _tuple(get_args(annotation))
    if annotation is type(None):
        return "`null`"
    if _values_in(annotation):
        return "mapping, see below"
    if any(getattr(part, "func", None) in (local, expanded) for part in metadata):
        return "path" if any(getattr(part, "func", None) is local for part in metadata) else "path or URL"
    word = WORDS.get(get_origin(annotation) or annotation, str(annotation))
    return " ".join([word, *_bounds(metadata)])


def _tuple(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {_type(arguments[0], [])}"
    return f"list of {len(arguments)}: {', '.join(_type(argument, []) for argument in arguments)}"


def _bounds(metadata: list[Any]) -> list[str]:
    signs = {annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", "≥"), annotated_types.Lt: ("lt", "<"), annotated_types.Le: ("le", "≤")}
    flat = [part for field in metadata for part in (field.metadata if isinstance(field, FieldInfo) else [field])]
    found = [(signs[type(part)][1], getattr(part, signs[type(part)][0])) for part in flat if type(part) in signs]
    return [", ".join(f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}" for sign, bound in found)] if found else []
