"""The tables of all configuration keys, made from the pydantic models that read a run file.

Types, bounds and defaults are those of the fields. The meaning of a key stands under `Attributes:` in the docstring of
its section. A key without an entry there is a warning, which the strict build refuses.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pretrain.config.model_section import ModelSection, RopeSection, hf_class
from pretrain.config.schema import Config
from pretrain.methods import REGISTRY
from pretrain.methods.base import Method
from pretrain.paths import expanded, local
from pretrain.values import Values

PAGE = "reference/configuration.md"
MARK = "<!-- keys -->"
METHODS = """## methods {#methods}

A list of mappings. `name` selects the method, the other keys are its options. [Methods](../methods.md) describes each.
"""
WORDS = {int: "integer", float: "number", str: "text", dict: "mapping"}
SIGNS = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}
log = logging.getLogger("mkdocs.hooks.configuration_reference")


@dataclass(frozen=True)
class Section:
    """A section of a run file: the path of its key, and the value of the key that selects it among several."""

    path: str
    model: type[Values]
    kind: str = ""

    @property
    def anchor(self) -> str:
        """The name that links to the section use."""
        return "-".join(filter(None, (self.path, self.kind)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables in the place of the mark."""
    return markdown.replace(MARK, tables()) if page.file.src_uri == PAGE else markdown


def tables() -> str:
    """Return the sections of the page in Markdown."""
    sections: dict[type[Values], Section] = {}
    for section in _sections_below(Config):
        sections.setdefault(section.model, section)  # `model.rope_scaling` has the keys of `model.rope_parameters`
    parts = [_written(Section("run", Config), sections, "##")]
    parts += [_written(section, sections, "##") for section in sections.values()]
    parts.append(METHODS)
    parts += [_written(Section(name, method), sections, "###") for name, method in sorted(REGISTRY.items())]
    return "\n".join(parts)


def _sections_below(model: type[Values], path: str = "") -> Iterator[Section]:
    """Yield every section within a section, in the order of the keys; methods have a part of their own."""
    for key, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            if not issubclass(inner, Method):
                yield Section(path + key, inner, _kind_of(inner))
                yield from _sections_below(inner, f"{path}{key}.")


def _models_in(annotation: Any) -> list[type[Values]]:
    """Return the sections that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Values):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _kind_of(model: type[Values]) -> str:
    """Return the value that selects this section where a key takes one of several, such as "llama"."""
    for key in ("family", "distribution"):
        if key in model.model_fields:
            return get_args(model.model_fields[key].annotation)[0]
    return ""


def _written(section: Section, sections: Mapping[type[Values], Section], heading: str) -> str:
    """Return a section's heading, its description and the table of its keys."""
    text, meanings = _docstring(section.model)
    title = f"{section.path}: {section.kind}" if section.kind else section.path
    keys = {key: field for key, field in section.model.model_fields.items() if not _selects(key, section)}
    lines = [f"{heading} {title} {{#{section.anchor}}}", "", text, ""]
    if not keys:
        return "\n".join([*lines, "No options.", ""])
    rows = [
        (f"`{key}`", *_type_and_default(key, field, section, sections), meanings.get(key, ""))
        for key, field in keys.items()
    ]
    foreign = issubclass(section.model, ModelSection | RopeSection)
    for key in keys.keys() - meanings.keys():
        if not foreign:
            log.warning("%s.%s has no entry under 'Attributes:' in its docstring", section.model.__name__, key)
    columns = ["key", "type", "default", "meaning"]
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table), ""])


def _selects(key: str, section: Section) -> bool:
    """Return whether a key only says which section it is."""
    return key in ("family", "distribution") or (key == "name" and issubclass(section.model, Method))


def _docstring(model: type[Values]) -> tuple[str, dict[str, str]]:
    """Return the text of a section's docstring and the meaning of each key, from its bases too."""
    text, meanings = "", {}
    for base in reversed(model.__mro__):
        if not issubclass(base, Values) or base in (Values, Method) or not vars(base).get("__doc__"):
            continue
        parsed = griffe.Docstring(inspect.cleandoc(base.__doc__ or ""), lineno=1).parse("google")
        text = "\n\n".join(part.value for part in parsed if part.kind is griffe.DocstringSectionKind.text)
        for part in parsed:
            if part.kind is griffe.DocstringSectionKind.attributes:
                meanings |= {attribute.name: " ".join(attribute.description.split()) for attribute in part.value}
    return text, meanings


def _type_and_default(
    key: str, field: FieldInfo, section: Section, sections: Mapping[type[Values], Section]
) -> tuple[str, str]:
    inner = [sections[model] for model in _models_in(field.annotation) if model in sections]
    if issubclass(section.model, ModelSection):  # null, the default of all its keys, leaves transformers' value
        hf = hf_class(section.kind)
        defaults = {found.name: found.default for found in dataclasses.fields(hf)}
        default = defaults.get(hf.attribute_map.get(key, key))
        given = reduce(or_, (part for part in get_args(field.annotation) if part is not type(None)))
        known = isinstance(default, str | bool | int | float)
        return _link(inner) or _type(given, field.metadata), _code(default) if known else ""
    if inner:
        return _link(inner) + (" or `null`" if type(None) in get_args(field.annotation) else ""), _default(field)
    if key == "methods":
        return "list of [mappings](#methods)", "`[]`"
    return _type(field.annotation, field.metadata), _default(field)


def _link(inner: list[Section]) -> str:
    return f"[mapping](#{inner[0].anchor})" if inner else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    return "" if isinstance(field.default, Values) else _code(field.default)


def _code(value: Any) -> str:
    """Return a value as YAML has it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Return a type with its bounds, in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(argument, metadata) for argument in arguments))
    if get_origin(annotation) is Literal:
        return " or ".join(_code(value) for value in arguments)
    if get_origin(annotation) is tuple:
        several = len(arguments) == 2 and arguments[1] is Ellipsis
        return (
            f"list of {_type(arguments[0], [])}" if several else f"list of {len(arguments)}: {_type(arguments[0], [])}"
        )
    if annotation is type(None):
        return "`null`"
    if annotation is bool:
        return "`true` or `false`"
    readers = [getattr(part, "func", None) for part in metadata]
    if local in readers:
        return "path"
    if expanded in readers:
        return "path or URL"
    return " ".join([WORDS[get_origin(annotation) or annotation], *_bounds(metadata)])


def _bounds(metadata: list[Any]) -> list[str]:
    """Return ["> 0, < 1"] for a number within bounds, [] for one without."""
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [f"{SIGNS[type(part)]} {_number(part)}" for part in parts if type(part) in SIGNS]
    return [", ".join(found)] if found else []


def _number(bound: Any) -> str:
    value = next(getattr(bound, name) for name in ("gt", "ge", "lt", "le") if hasattr(bound, name))
    power = value.bit_length() - 1 if isinstance(value, int) and value > 2**20 else 0
    return f"2^{power}" if power and value == 2**power else f"{value:g}"
