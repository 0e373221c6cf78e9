"""One tensor that lies in many places: ranges of tensor-parallel slices of it, in the files of several ranks.

Both what is stored and what is wanted are such ranges. A range of the flattened slice covers at most three rectangles of the
full matrix: the rest of its first row, whole rows, and the beginning of its last row. Where a stored rectangle and a wanted
one overlap, the overlap is copied:

    stored by rank 1 of 3       wanted: slice of columns 2, 3         read
    . . . .                     . . x x                               . . . .
    . s s s                     . . x x                               . . r r
    s s s .                     . . x x                               . . r .
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from pretrain.checkpoints.stored.files import Span, read_span
from pretrain.errors import UserError
from pretrain.sharded.piece import Slice

_BLOCK = 1 << 20  # elements that are read at once
_WORTH_SEEKING = 1 << 14  # elements: a stretch of this length is read alone, without what lies between it and the next


@dataclass(frozen=True)
class Part:
    """The elements of the flattened `slice` from `start` on, as many as `span` holds."""

    slice: Slice
    start: int
    span: Span


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of shape `shape`, whose elements each lie in one of `parts`. It is read as float32. Calling it reads it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __call__(self) -> torch.Tensor:
        """Read and return the whole tensor, float32. Raise UserError as `read_into` does."""
        whole = torch.empty(self.shape, dtype=torch.float32)
        self.read_into(whole.view(-1), Slice(self.shape), 0)
        return whole

    def read_into(self, out: torch.Tensor, part: Slice, start: int) -> None:
        """Read the elements of a slice from number `start` on, and little besides them. Memory holds one block besides `out`.

        Args:
            out: (elements,) float32 on any device, to be filled.
            part: a tensor-parallel slice of the tensor.
            start: the index in the flattened slice of the first element.

        Raises:
            UserError: a file ends too early, or the parts do not hold all elements.
        """
        found = 0
        for wanted in _rectangles(part, start, out.numel()):
            for stored in self.parts:
                for held in _rectangles(stored.slice, stored.start, stored.span.count):
                    if overlap := _overlap(held, wanted):
                        _copy(stored.span, held, out, wanted, overlap)
                        found += overlap.rows * overlap.columns
        if found != out.numel():
            files = ", ".join(sorted({stored.span.file.name for stored in self.parts}))
            raise UserError(f"a weight of shape {self.shape} lacks {out.numel() - found} of its values in {files}.")


@dataclass(frozen=True)
class _Rectangle:
    """Rows and columns of the full matrix, and their place in flat memory.

    Attributes:
        row: its first row.
        rows: the number of rows.
        column: its first column.
        columns: the number of columns.
        place: the index of its first element in flat memory.
        stride: the distance from one row to the next in flat memory.
    """

    row: int
    rows: int
    column: int
    columns: int
    place: int
    stride: int

    def index(self, row: int, column: int) -> int:
        """Return the index in flat memory of an element of the full matrix."""
        return self.place + (row - self.row) * self.stride + column - self.column


def _rectangles(part: Slice, start: int, count: int) -> Iterator[_Rectangle]:
    """Yield the rectangles that `count` elements of the flattened slice cover, from number `start` on."""
    row, column, width = 0, 0, prod(part.shape[1:])
    if part.dim == 0:
        row = part.first
    elif part.dim is not None:
        column, width = part.first, part.length
    place = 0
    while place < count:
        down, across = divmod(start + place, width)
        left = count - place
        rows, columns = (left // width, width) if across == 0 and left >= width else (1, min(left, width - across))
        yield _Rectangle(row + down, rows, column + across, columns, place, width)
        place += rows * columns


def _overlap(one: _Rectangle, other: _Rectangle) -> _Rectangle | None:
    """Return what two rectangles have in common, without a place in memory; None for nothing."""
    row, column = max(one.row, other.row), max(one.column, other.column)
    rows = min(one.row + one.rows, other.row + other.rows) - row
    columns = min(one.column + one.columns, other.column + other.columns) - column
    return _Rectangle(row, rows, column, columns, 0, 0) if rows > 0 and columns > 0 else None


def _copy(span: Span, held: _Rectangle, out: torch.Tensor, wanted: _Rectangle, overlap: _Rectangle) -> None:
    """Copy an overlap from a span that holds `held` to flat memory that holds `wanted`, block by block."""
    rows, columns = overlap.rows, overlap.columns
    if columns == held.stride == wanted.stride:  # whole rows on both sides: one stretch
        rows, columns = 1, rows * columns
    source = held.index(overlap.row, overlap.column)
    target = wanted.index(overlap.row, overlap.column)
    if rows == 1:
        for first in range(0, columns, _BLOCK):
            count = min(_BLOCK, columns - first)
            _read(span.part(source + first, count), out[target + first : target + first + count])
        return
    at_once = 1 if columns >= _WORTH_SEEKING else max(1, _BLOCK // held.stride)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        block = read_span(span.part(source + first * held.stride, (count - 1) * held.stride + columns))
        goal = out.as_strided(
            (count, columns), (wanted.stride, 1), out.storage_offset() + target + first * wanted.stride
        )
        goal.copy_(block.as_strided((count, columns), (held.stride, 1)))


def _read(span: Span, out: torch.Tensor) -> None:
    """Read a span into contiguous memory on any device."""
    if out.device.type == "cpu":
        read_span(span, out)
    else:
        out.copy_(read_span(span))
