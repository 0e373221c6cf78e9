"""Bounded pieces of a source file, small enough to send to another process, which turns them into texts.

Each kind has `file`, the number of the file in its source, `place`, where it is for people, and `bytes`, about how much
text it holds. What a reader could not read is a block too, which says so when its texts are asked for.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from pretrain.data.text.files import SourceFile
from pretrain.data.text.selection import BadRecord, Selection
from pretrain.errors import UserError

# What the libraries raise on damaged files and on features that they lack; Arrow's errors are kinds of these.
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, KeyError, NotImplementedError)
_BUFFER_BYTES = 1 << 20  # without one (or with pre_buffer) pyarrow holds whole columns of a row group, compressed


class Unreadable(UserError):
    """Damage at `place`; what comes after it may be whole."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)  # of which pickle makes it anew
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.fault}. Mend or leave out the file."

    @property
    def fault(self) -> str:
        return f"cannot read {self.place}: {self.reason}"


class Block(Protocol):
    file: int
    place: str
    bytes: int

    def texts(self) -> list[str]:
        """The text of each record, in order; empty where there is none or the record does not count.

        Unreadable for damage, another UserError for records that are not what was asked for.
        """


@dataclass(frozen=True)
class TextBlock:
    """One text."""

    file: int
    place: str
    text: str

    @property
    def bytes(self) -> int:
        return len(self.text)

    def texts(self) -> list[str]:
        return [self.text]


@dataclass(frozen=True)
class LinesBlock:
    """Whole lines of JSON, the first of which has the number `first` (from 1) in its file."""

    file: int
    path: str
    first: int
    content: bytes
    selection: Selection

    @property
    def place(self) -> str:
        return f"{self.path}, from line {self.first}"

    @property
    def bytes(self) -> int:
        return len(self.content)

    def texts(self) -> list[str]:
        texts = []
        for number, line in enumerate(self.content.split(b"\n"), start=self.first):
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"{self.path}, line {number}", f"it is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise Unreadable(
                    f"{self.path}, line {number}", f"it should be a JSON object and is a {type(record).__name__}"
                )
            try:
                texts.append(self.selection.text_of(record))
            except BadRecord as error:
                raise UserError(f"{self.path}, line {number}, {error}") from error
        return texts

    def lines(self) -> list[LinesBlock]:
        """Each line by itself."""
        lines = enumerate(self.content.split(b"\n"), start=self.first)
        return [replace(self, first=number, content=line) for number, line in lines]


@dataclass(frozen=True)
class TableBlock:
    """Rows of a table as an Arrow IPC stream."""

    file: int
    place: str
    content: bytes
    selection: Selection

    @property
    def bytes(self) -> int:
        return len(self.content)

    def texts(self) -> list[str]:
        import pyarrow.ipc

        with pyarrow.ipc.open_stream(io.BytesIO(self.content)) as stream:
            return _texts_in(stream.read_all(), self.selection, self.place)


@dataclass(frozen=True)
class RowGroupBlock:
    """Row group `group` of a Parquet file, read where it is turned into texts."""

    file: int
    source: SourceFile
    group: int
    bytes: int
    selection: Selection

    @property
    def place(self) -> str:
        return f"{self.source.path}, row group {self.group}"

    def texts(self) -> list[str]:
        try:
            table = open_parquet(self.source).read_row_group(
                self.group, columns=self.selection.fields, use_threads=False
            )
        except UserError:
            raise
        except UNREADABLE as error:
            raise unreadable(self.place, error) from error
        return _texts_in(table, self.selection, self.place)


@dataclass(frozen=True)
class UnreadableBlock:
    """What a reader could not read."""

    file: int
    fault: Unreadable
    bytes = 0

    @property
    def place(self) -> str:
        return self.fault.place

    def texts(self) -> list[str]:
        raise self.fault


@lru_cache(maxsize=1)
def open_parquet(source: SourceFile):
    """The `ParquetFile`; kept open, since the row groups of a file follow each other."""
    import pyarrow.parquet

    place = source.open() if source.is_remote else source.path
    return pyarrow.parquet.ParquetFile(
        place, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def readable_texts(block: Block, faults: list[Unreadable]) -> list[str]:
    """The texts of `block` but for what is damaged, which is added to `faults`: a line where there are lines, or all."""
    try:
        return block.texts()
    except Unreadable as fault:
        lines = block.lines() if isinstance(block, LinesBlock) else []
        if len(lines) > 1:
            return [text for line in lines for text in readable_texts(line, faults)]
        faults.append(fault)
        return []


def unreadable(place: str, error: Exception) -> UserError:
    """What to raise for an UNREADABLE `error`: Unreadable unless the system or a library is at fault, not the content."""
    fault = Unreadable(place, f"{type(error).__name__}: {error}")
    lacking = isinstance(error, NotImplementedError) or getattr(error, "errno", None) is not None
    return UserError(str(fault)) if lacking else fault


def _texts_in(table, selection: Selection, place: str) -> list[str]:
    """The texts of an Arrow table that has the selection's fields."""
    try:
        columns = [table.column(field).to_pylist() for field in selection.fields]
        return [selection.text_of(dict(zip(selection.fields, row, strict=True))) for row in zip(*columns, strict=True)]
    except BadRecord as error:
        raise UserError(f"{place}, {error}") from error
    except UNREADABLE as error:
        raise unreadable(place, error) from error
