"""Bounded pieces of a source file, small enough to send to another process, which turns them into texts.

A part that a reader could not read is a block too: its only record is the fault.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pretrain.data.text.columns import records_of
from pretrain.data.text.faults import BadRecord, Fault, NullText, Tally, Unreadable
from pretrain.data.text.selection import Selection, WrongField
from pretrain.data.text.source_files import SourceFile
from pretrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

# What the libraries raise on damaged files and on features that they lack; Arrow's errors are kinds of these.
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, KeyError, NotImplementedError)
_BUFFER_BYTES = 1 << 20  # without one (or with pre_buffer) pyarrow holds whole columns of a row group, compressed


class Block(ABC):
    """A part of a source file.

    Attributes:
        file: The number of the file in its source.
    """

    file: int

    @property
    @abstractmethod
    def place(self) -> str:
        """Its place, for people."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """About how many bytes of text it holds."""

    @abstractmethod
    def records(self) -> Iterator[str | Fault | None]:
        """Yield for each record, in order, its text, its fault, or None where a filter leaves it out."""

    def texts(self) -> list[str]:
        """Return the text of each record, in order; empty where there is none or the record does not count.

        Raises:
            Fault: A record is bad, or a part cannot be read.
        """
        texts = []
        for found in self.records():
            if isinstance(found, Fault) and not isinstance(found, NullText):
                raise found
            texts.append(found if isinstance(found, str) else "")
        return texts


@dataclass(frozen=True)
class TextBlock(Block):
    """One text of the file at `path`."""

    file: int
    path: str
    text: str

    @property
    def place(self) -> str:
        return self.path

    @property
    def bytes(self) -> int:
        return len(self.text)

    def records(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class LinesBlock(Block):
    """Whole lines of JSON, one record each; the first has the number `first` (from 1) among the file's lines or records."""

    file: int
    path: str
    first: int
    content: bytes
    selection: Selection
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.path}, from {self.unit} {self.first}"

    @property
    def bytes(self) -> int:
        return len(self.content)

    def records(self) -> Iterator[str | Fault | None]:
        keys = {name: json.dumps(name).encode() for name in self.selection.names}
        for number, line in enumerate(self.content.split(b"\n"), start=self.first):
            if not line or line.isspace():
                continue
            place = f"{self.path}, {self.unit} {number}"
            twice = [name for name, key in keys.items() if line.count(key) > 1]
            try:
                record = json.loads(line, object_pairs_hook=_each_once(twice) if twice else None)
            except WrongField as error:
                yield _fault(place, error)
            except (ValueError, RecursionError) as error:
                yield Unreadable(place, f"it is not JSON: {error}", "is not JSON")
            else:
                if isinstance(record, dict):
                    yield _text_or_fault(self.selection, record, place)
                else:
                    reason = f"it should be a JSON object and is a {type(record).__name__}"
                    yield Unreadable(place, reason, "is no JSON object")


@dataclass(frozen=True)
class TableBlock(Block):
    """Rows of a table as an Arrow IPC stream, the first of which is row `first` (from 0) of `part`."""

    file: int
    part: str
    first: int
    content: bytes
    selection: Selection

    @property
    def place(self) -> str:
        return f"{self.part}, from row {self.first}"

    @property
    def bytes(self) -> int:
        return len(self.content)

    def records(self) -> Iterator[str | Fault | None]:
        import pyarrow.ipc

        with pyarrow.ipc.open_stream(io.BytesIO(self.content)) as stream:
            yield from _found_in(stream.read_all(), self.selection, self.part, self.first)


@dataclass(frozen=True)
class RowGroupBlock(Block):
    """Row group `group` of a Parquet file, read by the process that turns it into texts."""

    file: int
    source: SourceFile
    group: int
    text_bytes: int
    selection: Selection

    @property
    def place(self) -> str:
        return f"{self.source.path}, row group {self.group}"

    @property
    def bytes(self) -> int:
        return self.text_bytes

    def records(self) -> Iterator[str | Fault | None]:
        try:
            table = open_parquet(self.source).read_row_group(
                self.group, columns=self.selection.fields, use_threads=False
            )
        except UserError:
            raise
        except UNREADABLE as error:
            self.source.check_unchanged()
            yield unreadable(self.place, error)
            return
        self.source.check_unchanged()
        yield from _found_in(table, self.selection, self.place, 0)


@dataclass(frozen=True)
class UnreadableBlock(Block):
    """A part that a reader could not read."""

    file: int
    fault: Fault

    @property
    def place(self) -> str:
        return self.fault.place

    @property
    def bytes(self) -> int:
        return 0

    def records(self) -> Iterator[Fault]:
        yield self.fault


def texts_of(block: Block, tally: Tally, skip_unreadable: bool) -> Iterator[str]:
    """Yield the texts of `block` that are not empty.

    Args:
        block: The block.
        tally: Counts all records, and those that give no text.
        skip_unreadable: Count faults. Otherwise the first is raised, unless it is a text that is null.
    """
    for found in block.records():
        tally.records += 1
        if isinstance(found, str) and found:
            yield found
        elif isinstance(found, Fault):
            if not skip_unreadable and not isinstance(found, NullText):
                found.before = tally.records - 1 - tally.bad
                raise found
            tally.add(block.file, found)
        elif found is None:
            tally.filtered += 1
        else:
            tally.empty += 1


@lru_cache(maxsize=1)
def open_parquet(source: SourceFile) -> pyarrow.parquet.ParquetFile:
    """Return the opened file, which stays open, since the row groups of a file follow each other."""
    import pyarrow.parquet

    place = source.open() if source.is_remote else source.path
    return pyarrow.parquet.ParquetFile(
        place, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def unreadable(place: str, error: Exception) -> Unreadable:
    """Return the fault for an UNREADABLE `error`; raise UserError if the system or a library is to blame, not the content."""
    fault = Unreadable(place, f"{type(error).__name__}: {error}")
    if isinstance(error, NotImplementedError) or getattr(error, "errno", None) is not None:
        raise UserError(str(fault)) from error
    return fault


def _found_in(table: pyarrow.Table, selection: Selection, part: str, first: int) -> Iterator[str | Fault | None]:
    """Yield the outcome of each row of an Arrow table that has the selection's fields."""
    try:
        records = records_of(table, selection)
    except UNREADABLE as error:
        yield unreadable(part, error)
        return
    for number, record in enumerate(records, start=first):
        yield _text_or_fault(selection, record, f"{part}, row {number}")


def _text_or_fault(selection: Selection, record: Mapping[str, Any], place: str) -> str | Fault | None:
    try:
        return selection.text_of(record)
    except WrongField as error:
        return _fault(place, error)


def _fault(place: str, error: WrongField) -> BadRecord:
    kind = NullText if error.is_null else BadRecord
    return kind(place, error.kind, error.reason, error.advice)


def _each_once(fields: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return a hook that refuses a JSON object with one of `fields` twice: readers differ in which of the two counts."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for field in fields:
            if keys.count(field) > 1:
                raise WrongField(f"has {keys.count(field)} fields '{field}'", advice="Leave all but one.")
        return dict(pairs)

    return made
