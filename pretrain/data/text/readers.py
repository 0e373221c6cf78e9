"""Readers turn each kind of file into blocks.

A reader begins a file at a place that it gave out, [0, 0] at first, and yields (block, place after it, bytes of the file
read so far). The ends of blocks depend on the file alone. Damage ends a file, except in a Parquet row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from pretrain.data.text import arrays, compression
from pretrain.data.text.blocks import (
    UNREADABLE,
    Block,
    LinesBlock,
    RowGroupBlock,
    TableBlock,
    UnreadableBlock,
    open_parquet,
    unreadable,
)
from pretrain.data.text.columns import check_fields, columns_of
from pretrain.data.text.faults import BadTable
from pretrain.data.text.kinds import LINES, compression_of
from pretrain.data.text.plain import read_plain, read_python
from pretrain.data.text.selection import Selection, WrongField
from pretrain.data.text.signatures import refuse_other_content
from pretrain.data.text.source_files import SourceFile
from pretrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 30
MAX_ROW_GROUP_BYTES = 1 << 25  # in the columns that are read; larger row groups are read in batches
MAX_REPEATING_ROWS = 1 << 10  # in a row group whose encodings can hold a long text many times in a few bytes
_REPEATING = {"RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BYTE_ARRAY"}
_BATCH_ROWS = 256
_ARROW_MAGIC = b"ARROW1"

Place = tuple[int, int]
Blocks = Iterator[tuple[Block, Place, int]]
Reader = Callable[[SourceFile, int, Selection, Place], Blocks]


def reader_of(file: SourceFile) -> Reader:
    """Return the reader for the kind of `file`."""
    if file.kind is None:
        raise ValueError(f"{file.path} is of no kind that can be read")
    return _READERS[file.kind]


def _read_lines(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """Read lines of JSON, compressed or not; the place is (bytes, lines) of content."""
    with file.open() as raw:
        start, lines = place
        skip = start
        if not compression_of(file.path):
            raw.seek(start)
            skip = 0
        try:
            for block in _whole_lines(_after(compression.content(raw, file.path), skip), file, lines):
                if not start:
                    refuse_other_content(block, file.path)
                yield (
                    LinesBlock(number, file.path, lines + 1, block, selection),
                    (start := start + len(block), lines := lines + block.count(b"\n")),
                    raw.tell(),
                )
        except UNREADABLE as error:
            raise unreadable(f"{file.path}, from line {lines + 1}", error) from error


def _read_json(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """Read one object a line, or an array of objects; the place in an array is (records, 0)."""
    with file.open() as raw:
        is_array = arrays.is_array(compression.content(raw, file.path))
    return (_read_array if is_array else _read_lines)(file, number, selection, place)


def _read_array(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    count, size = 0, 0
    held: list[bytes] = []
    with file.open() as raw:

        def block() -> tuple[Block, Place, int]:
            first = count - len(held) + 1
            return LinesBlock(number, file.path, first, b"\n".join(held), selection, "record"), (count, 0), raw.tell()

        try:
            for element in arrays.elements(compression.content(raw, file.path), MAX_LINE_BYTES):
                count += 1
                if count > place[0]:
                    held.append(element)
                    size += len(element)
                if size >= BLOCK_BYTES:
                    yield block()
                    held, size = [], 0
        except UNREADABLE as error:
            if held:
                yield block()
            raise unreadable(f"{file.path}, from record {count + 1}", error) from error
        if held:
            yield block()


def _after(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:]
        skip = max(skip - len(chunk), 0)


def _whole_lines(chunks: Iterator[bytes], file: SourceFile, lines: int) -> Iterator[bytes]:
    """Yield the shortest runs of whole lines of at least BLOCK_BYTES; the last may be shorter and end without a newline.

    The whole lines before damage are yielded before the fault is raised.
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
    """Yield row groups, which the encoding process reads, and batches of too large ones; the place is (group, rows)."""
    table = open_parquet(file)
    _check_fields(selection, table.schema_arrow, file, table.metadata.num_rows)
    begin, skip = place
    groups = table.metadata.num_row_groups
    for group in range(begin, groups):
        read = file.bytes * (group + 1) // groups
        encoded, at_most = _sizes(table.metadata.row_group(group), selection)
        repeats = at_most > encoded and table.metadata.row_group(group).num_rows > MAX_REPEATING_ROWS
        if encoded <= MAX_ROW_GROUP_BYTES and not repeats:
            yield RowGroupBlock(number, file, group, at_most, selection), (group + 1, 0), read
            continue
        where = f"{file.path}, row group {group}"
        try:
            for first, stop, content in _batches_of(table, group, selection, skip):
                yield TableBlock(number, where, first, content, selection), (group, stop), read
        except UNREADABLE as error:
            yield UnreadableBlock(number, unreadable(where, error)), (group + 1, 0), read
        skip = 0


def _batches_of(
    table: pyarrow.parquet.ParquetFile, group: int, selection: Selection, skip: int
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first row, rows by then, the rows as Arrow IPC) of a row group from row `skip` on."""
    start = 0
    for batch in table.iter_batches(_BATCH_ROWS, [group], selection.fields, use_threads=False):
        for first, stop, content in _slices(_only(batch, selection), skip - start):
            yield start + first, start + stop, content
        start += len(batch)


def _sizes(row_group: pyarrow.parquet.RowGroupMetaData, selection: Selection) -> tuple[int, int]:
    """Return the bytes of the selection's columns as they are encoded, and the most that they can become."""
    encoded = at_most = 0
    for column in map(row_group.column, range(row_group.num_columns)):
        path = column.path_in_schema  # for a nested field, it begins with the names that lead there
        if any(path == field or path.startswith(f"{field}.") for field in selection.fields):
            size = column.total_uncompressed_size
            encoded += size
            at_most += size * row_group.num_rows if _REPEATING.intersection(column.encodings) else size
    return encoded, at_most


def _read_arrow(file: SourceFile, number: int, selection: Selection, place: Place) -> Blocks:
    """Read the record batches of an Arrow IPC file, with or without a footer; the place is (batch, rows)."""
    import pyarrow

    begin, skip = place
    with file.open() if file.is_remote else pyarrow.memory_map(file.path) as raw:
        for count, batch in enumerate(_record_batches(raw, selection, file)):
            where = f"{file.path}, record batch {count}"
            for first, stop, content in _slices(batch, skip) if count >= begin else ():
                yield TableBlock(number, where, first, content, selection), (count, stop), raw.tell()
                if not file.is_remote:  # reading a mapped part that the file has lost would end this process
                    file.check_unchanged()
            skip = 0 if count >= begin else skip


def _record_batches(raw: BinaryIO, selection: Selection, file: SourceFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    has_footer = raw.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    raw.seek(0)
    if has_footer:
        table = pyarrow.ipc.open_file(raw)
        batches: Iterator[pyarrow.RecordBatch] = map(table.get_batch, range(table.num_record_batches))
    else:
        table = pyarrow.ipc.open_stream(raw)
        batches = _until_end_mark(table, raw, file.bytes)
    _check_fields(selection, table.schema, file, 1)
    count = 0
    try:
        for batch in batches:
            yield _only(batch, selection)
            count += 1
    except UNREADABLE as error:
        raise unreadable(f"{file.path}, from record batch {count}", error) from error


def _until_end_mark(stream: pyarrow.RecordBatchStreamReader, raw: BinaryIO, size: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of a stream that fills `raw`; Arrow itself accepts one that was cut between two messages."""
    while True:
        start = raw.tell()
        if (batch := next(stream, None)) is None:
            break
        yield batch
    if raw.tell() == start:
        raise EOFError(f"the stream ends without its end mark, at byte {start}")
    if raw.tell() != size:
        raise ValueError(f"the stream ends at byte {raw.tell()}, and the file goes on")


def _only(batch: pyarrow.RecordBatch, selection: Selection) -> pyarrow.RecordBatch:
    """Return the columns that the selection reads, under the names of its fields."""
    import pyarrow

    return pyarrow.record_batch(columns_of(batch, selection), names=selection.fields)


def _slices(batch: pyarrow.RecordBatch, skip: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first row, rows by then, the rows as Arrow IPC) in pieces of about BLOCK_BYTES from row `skip` on."""
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
            yield start, start + len(piece), sink.getvalue().to_pybytes()


def _without_dictionaries(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Return the rows with the values themselves; otherwise each piece would carry the whole dictionary."""
    import pyarrow

    columns = [
        column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column for column in batch
    ]
    return pyarrow.record_batch(columns, names=batch.schema.names)


def _check_fields(selection: Selection, schema: pyarrow.Schema, file: SourceFile, records: int) -> None:
    """Raise BadTable, which stands for all `records` of the file, unless its schema has the fields."""
    try:
        check_fields(selection, schema)
    except WrongField as error:
        raise BadTable(file.path, error.kind, error.reason, error.advice, records) from error


_READERS: dict[str, Reader] = {
    ".txt": read_plain,
    ".py": read_python,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    **dict.fromkeys(LINES, _read_lines),
    ".json": _read_json,
}
