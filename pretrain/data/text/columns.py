"""The columns of a table that a selection reads: by name, or by a path into columns that hold records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pretrain.data.text.selection import Selection, WrongField

if TYPE_CHECKING:
    import pyarrow


def check_fields(selection: Selection, schema: pyarrow.Schema) -> None:
    """Raise WrongField unless a table of this schema has every field of the selection, each once."""
    for field in selection.fields:
        if (count := schema.names.count(field)) > 1:
            raise WrongField(f"has {count} fields '{field}'", advice="Rename all but one, or leave out the file.")
        if not count and not _path_to(schema, field):
            raise selection.no_field(field, list(_names(schema)))


def columns_of(
    table: pyarrow.Table | pyarrow.RecordBatch, selection: Selection
) -> list[pyarrow.Array | pyarrow.ChunkedArray]:
    """Return the column of each field of the selection, in their order; a field may lie within a column of records."""
    from pyarrow.compute import struct_field

    columns = []
    for field in selection.fields:
        path = [field] if field in table.schema.names else _path_to(table.schema, field)
        column = table.column(path[0])
        columns.append(struct_field(column, path[1:]) if path[1:] else column)
    return columns


def records_of(table: pyarrow.Table, selection: Selection) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table, by field."""
    columns = [_values(column) for column in columns_of(table, selection)]
    fields = selection.fields
    return (dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list:
    """Return the values of a column; as bytes where not all of its text is UTF-8, so that each is checked by itself."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column.cast(pyarrow.large_binary()).to_pylist()


def _path_to(fields: pyarrow.Schema | pyarrow.StructType, field: str) -> list[str]:
    """Return the names that lead from `fields` to `field`, the first of which is one of `fields`; [] if there is no path."""
    import pyarrow

    if fields.get_field_index(field) >= 0:
        return [field]
    head, _, rest = field.partition(".")
    index = fields.get_field_index(head)
    if not rest or index < 0 or not pyarrow.types.is_struct(fields.field(index).type):
        return []
    further = _path_to(fields.field(index).type, rest)
    return [head, *further] if further else []


def _names(schema: pyarrow.Schema) -> Iterator[str]:
    """Yield the fields of a schema that a selection may name, down to the fields of a column's records."""
    import pyarrow

    for field in schema:
        yield field.name
        if pyarrow.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)
