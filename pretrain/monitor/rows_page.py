"""The page docs/metrics.md, made from the types of the rows: `python -m pretrain.monitor.rows_page > docs/metrics.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

from pretrain.monitor import rows

_INTRODUCTION = (
    "# Metrics\n\n"
    "`metrics.jsonl` in the run folder holds what a run measures: one JSON object a line, written by rank 0. The field "
    "`kind` says what a row is about. A resumed run appends to the same file: after a resume or a rollback the last row "
    "of a step counts. NaN and infinity are written as `null`.\n\n"
    "[The report](report.md) draws these rows. [wandb](configuration.md#tracking-with-wandb) gets all but the events, "
    "under names such as `train/loss`, `weights/<name>/std` and `activations/layers/<layer>/top`. In older files "
    "the names in `weights` stand beside `kind` and `step`. The report and the tracker still read those.\n\n"
    "This page is made from the types in [rows.py](../pretrain/monitor/rows.py).\n"
)
_TYPES = {bool: "`true` or `false`", int: "integer", float: "number", str: "text", type(None): "`null`"}


def page() -> str:
    """Return the page in Markdown."""
    events = get_args(rows.AnyEvent)
    parts = [_INTRODUCTION, *_section("Every row", rows.Row, "##", without=None)]
    for kind in get_args(rows.AnyRow):
        if kind not in events:
            parts += _section(_names(kind, "kind"), kind, "##", without=rows.Row)
    parts += _section(_names(rows.EventRow, "kind"), rows.EventRow, "##", without=rows.Row)
    for event in events:
        parts += _section(_names(event, "event"), event, "###", without=rows.EventRow)
    return "\n".join(parts)


def fields(row: type) -> dict[str, tuple[str, str, str]]:
    """Return the type, the unit and the meaning of each described field of a row, by its name."""
    found = {}
    for name, hint in get_type_hints(row, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        if optional:
            hint = get_args(hint)[0]
        if get_origin(hint) is Annotated:
            kind, description = get_args(hint)
            unit, _, meaning = description.partition("; ")
            absent = ", may be absent" if optional else ""
            found[name] = (_type(kind) + absent, "" if unit == "-" else unit, meaning)
    return found


def _section(title: str, row: type, heading: str, without: type | None) -> Iterator[str]:
    """Yield a heading, the docstring, a table of the fields that `without` lacks, and sections for what they hold."""
    known = fields(without) if without else {}
    own = {name: field for name, field in fields(row).items() if name not in known}
    yield f"{heading} {title}\n\n{inspect.getdoc(row)}\n"
    if own:
        table = [("field", "type", "unit", "meaning"), ("---",) * 4]
        table += [(f"`{name}`", *field) for name, field in own.items()]
        yield "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"
    for name, held in _held_rows(row):
        yield from _section(f"Values in `{name}`", held, heading + "#", without=None)


def _held_rows(row: type) -> Iterator[tuple[str, type]]:
    """Yield each field that holds objects of a type of its own, with that type."""
    for name, hint in get_type_hints(row).items():
        yield from ((name, part) for part in get_args(hint) if is_typeddict(part))


def _names(row: type, field: str) -> str:
    """Return the values of the field that tells the rows apart."""
    return ", ".join(f"`{name}`" for name in get_args(get_type_hints(row)[field]))


def _type(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_type, get_args(kind)))
    if get_origin(kind) is dict:
        return f"{_type(get_args(kind)[1])} by name"
    if get_origin(kind) is list:
        return f"list of {_type(get_args(kind)[0])}s"
    return "object" if is_typeddict(kind) else _TYPES[kind]


if __name__ == "__main__":
    print(page(), end="")
