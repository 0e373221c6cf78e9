"""How each kind of file becomes blocks.

A reader takes up a file at a place that it gave out, [0, 0] at first, and yields (block, place after it, bytes of the
file read by then). Where blocks end depends on the file alone. Damage ends a file, except in a Parquet row group.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterator
from typing import BinaryIO

from pretrain.data.text import compression, documents
from pretrain.data.text.blocks import (
    UNREADABLE,
    Block,
    LinesBlock,
    RowGroupBlock,
    TableBlock,
    TextBlock,
    Unreadable,
    UnreadableBlock,
    open_parquet,
    unreadable,
)
from pretrain.data.text.files import LINES, SourceFile, library_folder
from pretrain.data.text.selection import BadRecord, Selection
from pretrain.errors import UserError

BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 30
MAX_ROW_GROUP_BYTES = 1 << 25  # of the columns that are read; larger ones are taken in batches
MAX_REPEATING_ROWS = 1 << 10  # of a row group whose encodings can hold a long text many times in a few bytes
TOPICS = "pydoc_data/topics.py"
_REPEATING = {"RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BYTE_ARRAY"}
_BATCH_ROWS = 256
_ARROW_MAGIC = b"ARROW1"

Place = tuple[int, int]
Blocks = Iterator[tuple[Block, Place, int]]
Reader = Callable[[SourceFile, int, Selection, Place], Blocks]


def reader_of(file: SourceFile) -> Reader:
    return _READERS[file.ending]


def _read_plain(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """A text file is one text, or several when it is too long to hold in memory; the place counts them."""
    with file.open() as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        limit = documents.MAX_DOCUMENT_CHARACTERS
        count = 0
        while text := stream.read(limit):
            if len(text) == limit:
                text += stream.readline(limit)
            count += 1
            if count > place[0]:
                yield TextBlock(number, file.path, text), (count, 0), raw.tell()


def _read_python(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """A Python source is one text, in the encoding it declares; pydoc's topics are a text each."""
    for count, text in enumerate(_python_texts(file), start=1):
        if count > place[0]:
            yield TextBlock(number, file.path, text), (count, 0), file.bytes


def _python_texts(file: SourceFile) -> Iterator[str]:
    if file.path == str(library_folder() / TOPICS):
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
        return
    with file.open() as raw:
        encoding, _ = tokenize.detect_encoding(raw.readline)
        raw.seek(0)
        yield raw.read().decode(encoding)


def _read_lines(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """Lines of JSON, compressed or not; the place is (bytes, lines) of content."""
    with file.open() as raw:
        start, lines = place
        skip = start
        if not file.path.endswith((".gz", ".zst")):
            raw.seek(start)
            skip = 0
        try:
            for block in _whole_lines(_after(compression.content(raw, file.path), skip), file, lines):
                yield (
                    LinesBlock(number, file.path, lines + 1, block, selection),
                    (start := start + len(block), lines := lines + block.count(b"\n")),
                    raw.tell(),
                )
        except UNREADABLE as error:
            raise unreadable(f"{file.path}, from line {lines + 1}", error) from error


def _after(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:]
        skip = max(skip - len(chunk), 0)


def _whole_lines(chunks: Iterator[bytes], file: SourceFile, lines: int) -> Iterator[bytes]:
    """The shortest runs of whole lines of at least BLOCK_BYTES; the last may be shorter and end without a newline.

    The whole lines before damage come before it is raised.
    """
    held = bytearray()
    try:
        for chunk in chunks:
            searched = max(len(held), BLOCK_BYTES - 1)
            held += chunk
            while end := held.find(b"\n", searched) + 1:
                block = bytes(held[:end])
                del held[:end]
                lines += block.count(b"\n")
                searched = BLOCK_BYTES - 1
                yield block
            if len(held) > MAX_LINE_BYTES:
                newlines = held.count(b"\n")
                raise UserError(
                    f"{file.path}, line {lines + 1 + newlines}, has more than {MAX_LINE_BYTES >> 20} MiB. "
                    "A file of this kind holds one JSON object per line: convert it, or leave it out."
                )
    except (EOFError, ValueError):
        if end := held.rfind(b"\n") + 1:
            yield bytes(held[:end])
        raise
    if held:
        yield bytes(held)


def _read_parquet(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """Row groups for whoever encodes to read, and batches of those that are too large; the place is (group, rows)."""
    table = open_parquet(file)
    _check_fields(selection, table.schema_arrow.names, file)
    first, skip = place
    groups = table.metadata.num_row_groups
    for group in range(first, groups):
        read = file.bytes * (group + 1) // groups
        encoded, at_most = _sizes(table.metadata.row_group(group), selection)
        repeats = at_most > encoded and table.metadata.row_group(group).num_rows > MAX_REPEATING_ROWS
        if encoded <= MAX_ROW_GROUP_BYTES and not repeats:
            yield RowGroupBlock(number, file, group, at_most, selection), (group + 1, 0), read
            continue
        where = f"{file.path}, row group {group}"
        try:
            for stop, content in _batches_of(table, group, selection, skip):
                yield TableBlock(number, f"{where}, row {stop}", content, selection), (group, stop), read
        except UNREADABLE as error:
            if not isinstance(fault := unreadable(where, error), Unreadable):
                raise fault from error
            yield UnreadableBlock(number, fault), (group + 1, 0), read
        skip = 0


def _batches_of(table, group: int, selection: Selection, skip: int) -> Iterator[tuple[int, bytes]]:
    """(rows by then, the rows as Arrow IPC) of a row group from row `skip` on."""
    start = 0
    for batch in table.iter_batches(_BATCH_ROWS, [group], selection.fields, use_threads=False):
        for stop, content in _slices(batch, skip - start):
            yield start + stop, content
        start += len(batch)


def _sizes(row_group, selection: Selection) -> tuple[int, int]:
    """(bytes of the selection's columns as they are encoded, what they can at most become)."""
    encoded = at_most = 0
    for column in map(row_group.column, range(row_group.num_columns)):
        path = column.path_in_schema  # of a nested field, its own name comes first
        if path in selection.fields or path.split(".")[0] in selection.fields:
            size = column.total_uncompressed_size
            encoded += size
            at_most += size * row_group.num_rows if _REPEATING.intersection(column.encodings) else size
    return encoded, at_most


def _read_arrow(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """The record batches of an Arrow IPC file, with or without a footer; the place is (batch, rows)."""
    first, skip = place
    import pyarrow

    with file.open() if file.is_remote else pyarrow.memory_map(file.path) as raw:
        for count, batch in enumerate(_record_batches(raw, selection, file)):
            where = f"{file.path}, record batch {count}"
            for stop, content in _slices(batch, skip) if count >= first else ():
                yield TableBlock(number, f"{where}, row {stop}", content, selection), (count, stop), raw.tell()
            skip = 0 if count >= first else skip


def _record_batches(raw: BinaryIO, selection: Selection, file: SourceFile) -> Iterator:
    import pyarrow.ipc

    has_footer = raw.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    raw.seek(0)
    if has_footer:
        table = pyarrow.ipc.open_file(raw)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        table = pyarrow.ipc.open_stream(raw)
        batches = _until_end_mark(table, raw, file.bytes)
    _check_fields(selection, table.schema.names, file)
    count = 0
    try:
        for batch in batches:
            yield batch.select(selection.fields)
            count += 1
    except UNREADABLE as error:
        raise unreadable(f"{file.path}, from record batch {count}", error) from error


def _until_end_mark(stream, raw: BinaryIO, size: int) -> Iterator:
    """The record batches of a stream that is all of `raw`: Arrow takes one cut between two messages for a whole one."""
    while True:
        start = raw.tell()
        if (batch := next(stream, None)) is None:
            break
        yield batch
    if raw.tell() == start:
        raise EOFError(f"the stream ends without its end mark, at byte {start}")
    if raw.tell() != size:
        raise ValueError(f"the stream ends at byte {raw.tell()}, and the file goes on")


def _slices(batch, skip: int) -> Iterator[tuple[int, bytes]]:
    """(rows by then, the rows as Arrow IPC) in pieces of about BLOCK_BYTES, without the first `skip` rows."""
    import pyarrow.ipc

    rows = max(1, len(batch) * BLOCK_BYTES // max(batch.nbytes, 1))
    if any(pyarrow.types.is_dictionary(field.type) for field in batch.schema):
        rows = _BATCH_ROWS  # each of them may be as large as the whole dictionary
    for start in range(0, len(batch), rows):
        piece = _without_dictionaries(batch.slice(start, rows))
        if start + len(piece) > skip:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, piece.schema) as stream:
                stream.write_batch(piece)
            yield start + len(piece), sink.getvalue().to_pybytes()


def _without_dictionaries(batch):
    """The rows with the values themselves; else each piece would carry the values of all."""
    import pyarrow

    columns = [
        column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column for column in batch
    ]
    return pyarrow.record_batch(columns, names=batch.schema.names)


def _check_fields(selection: Selection, fields: list[str], file: SourceFile) -> None:
    try:
        selection.check(fields)
    except BadRecord as error:
        raise UserError(f"{file.path} {error}") from error


_READERS: dict[str, Reader] = {
    ".txt": _read_plain,
    ".py": _read_python,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    **dict.fromkeys(LINES, _read_lines),
}
