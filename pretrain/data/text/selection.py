"""The selection of records of a source that count, and of the field that is their text."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.errors import UserError

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FORM = re.compile(r"(?P<field>[^=!<>]+)(?P<sign><=|>=|!=|=|<|>)(?P<value>(?!\s*=).*)", re.DOTALL)


class WrongField(ValueError):
    """A record that lacks a field, or holds something else in it.

    Attributes:
        kind: The words that all such records share.
        reason: The words on this record, which continue a sentence that begins with its place.
        advice: What to do about it.
        is_null: The text is null.
    """

    def __init__(self, kind: str, reason: str | None = None, advice: str = "", is_null: bool = False) -> None:
        super().__init__(reason or kind)
        self.kind = kind
        self.reason = reason or kind
        self.advice = advice
        self.is_null = is_null


@dataclass(frozen=True)
class Filter:
    """One condition on a field, written like `language=en` or `language_score>=0.65`."""

    field: str
    sign: str
    value: str

    @classmethod
    def parse(cls, written: str) -> Filter:
        if (form := _FORM.fullmatch(written)) is None:
            raise UserError(
                f"--filter '{written}' is no condition: write a field, one of {' '.join(_COMPARISONS)} and a value, "
                "like 'language=en' or 'language_score>=0.65'."
            )
        return cls(form["field"].strip(), form["sign"], form["value"].strip())

    def __str__(self) -> str:
        return f"{self.field}{self.sign}{self.value}"

    def holds(self, found: object) -> bool:
        """Return whether a record with `found` in this field counts: numbers compare as numbers, nulls never match."""
        if found is None:
            return False
        if isinstance(found, bool):
            found = "true" if found else "false"
        if isinstance(found, bytes):
            found = _decoded(found, self.field)
        if isinstance(found, int | float):
            return _COMPARISONS[self.sign](found, self._number())
        if isinstance(found, str):
            return _COMPARISONS[self.sign](found, self.value)
        raise WrongField(f"field '{self.field}' holds a {type(found).__name__}, which --filter '{self}' cannot compare")

    def _number(self) -> int | float:
        for kind in (int, float):
            try:
                return kind(self.value)
            except ValueError:
                continue
        raise WrongField(f"field '{self.field}' holds numbers, and --filter '{self}' compares it with none")


@dataclass(frozen=True)
class Selection:
    """The text field, and the filters that must all hold."""

    text_field: str
    filters: tuple[Filter, ...] = ()

    @property
    def fields(self) -> list[str]:
        """Every field that is read, the text's first."""
        return list(dict.fromkeys([self.text_field, *(condition.field for condition in self.filters)]))

    @property
    def names(self) -> list[str]:
        """Every name under which a record may hold one of the fields, or a part of the path to it."""
        names = []
        for rest in self.fields:
            while rest:
                head, _, further = rest.partition(".")
                names += [rest, head]
                rest = further
        return list(dict.fromkeys(names))

    def text_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the text of one record, None if a filter leaves it out.

        A field `meta.text` is the one of that name, or else `text` in the object that is the field `meta`.

        Raises:
            WrongField: The record has no text, or a filter cannot be applied to it.
        """
        if not all(condition.holds(self._value(record, condition.field)) for condition in self.filters):
            return None
        text = self._value(record, self.text_field)
        if isinstance(text, bytes):
            return _decoded(text, self.text_field)
        if text is None:
            raise WrongField(f"field '{self.text_field}' is null", is_null=True)
        if not isinstance(text, str):
            raise WrongField(
                f"field '{self.text_field}' holds a {type(text).__name__}, not text", advice="Set --text-field."
            )
        return text

    def no_field(self, field: str, fields: Sequence[str]) -> WrongField:
        """Return the error for a record or table that has `fields` and not `field`."""
        option = "--text-field" if field == self.text_field else "--filter"
        return WrongField(
            f"has no field '{field}'",
            f"has no field '{field}'; its fields are {', '.join(fields) or 'none'}",
            f"Set {option} to one of them.",
        )

    def _value(self, record: Mapping[str, Any], field: str) -> Any:
        found: Any = record
        rest = field
        while isinstance(found, Mapping):
            if rest in found:
                return found[rest]
            head, _, rest = rest.partition(".")
            if not rest or head not in found:
                break
            if (found := found[head]) is None:
                return None
        raise self.no_field(field, list(record))


def _decoded(content: bytes, field: str) -> str:
    """Return the text of a column of bytes: some writers of Parquet do not mark theirs as text."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        kind = f"field '{field}' holds bytes that are not UTF-8"
        raise WrongField(kind, f"{kind} (byte {error.start}: {error.reason})") from error
