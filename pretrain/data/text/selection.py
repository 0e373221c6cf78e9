"""Which records of a source count, and which of their fields is the text."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
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


class BadRecord(ValueError):
    """A record that has no such field or something else in it; the message goes on from the record's place."""


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
        """Whether a record with `found` in this field counts: numbers compare as numbers, nulls never match."""
        if found is None:
            return False
        if isinstance(found, bool):
            found = "true" if found else "false"
        if isinstance(found, int | float):
            return _COMPARISONS[self.sign](found, self._number())
        if isinstance(found, str):
            return _COMPARISONS[self.sign](found, self.value)
        raise BadRecord(f"field '{self.field}' holds a {type(found).__name__}, which --filter '{self}' cannot compare.")

    def _number(self) -> int | float:
        for kind in (int, float):
            try:
                return kind(self.value)
            except ValueError:
                continue
        raise BadRecord(f"field '{self.field}' holds numbers, and --filter '{self}' compares it with none.")


@dataclass(frozen=True)
class Selection:
    """The text field, and the filters that must all hold."""

    text_field: str
    filters: tuple[Filter, ...] = ()

    @property
    def fields(self) -> list[str]:
        """Every field that is looked at, the text's first."""
        return list(dict.fromkeys([self.text_field, *(condition.field for condition in self.filters)]))

    def text_of(self, record: dict) -> str:
        """The text of one record; empty for a null and for a record that does not count. BadRecord on a wrong field."""
        try:
            if not all(condition.holds(record[condition.field]) for condition in self.filters):
                return ""
            text = record[self.text_field]
        except KeyError:
            self.check(list(record))
            raise
        if text is not None and not isinstance(text, str):
            raise BadRecord(f"field '{self.text_field}' holds a {type(text).__name__}, not text. Set --text-field.")
        return text or ""

    def check(self, fields: Sequence[str]) -> None:
        """BadRecord unless `fields`, all that there are, hold those that are looked at, each once."""
        for field in self.fields:
            if field not in fields:
                option = "--text-field" if field == self.text_field else "--filter"
                raise BadRecord(
                    f"has no field '{field}'; its fields are {', '.join(fields)}. Set {option} to one of them."
                )
            if fields.count(field) > 1:
                raise BadRecord(
                    f"has {fields.count(field)} fields '{field}'. Rename all but one, or leave out the file."
                )
