"""Means over the rows of a matrix, when each rank has a flat range that may begin and end within a row.

    matrix (4 x 3), elements [2:10]     taken apart into
    . . x                               the end of a row, 1 x 1 from column 2 on
    x x x                               whole rows, 2 x 3
    x x x
    x . .                               the start of a row, 1 x 1

Sums are taken in float64: the mean is small beside the elements once it has been subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.sharded.moments import CHUNK
from pretrain.sharded.piece import Piece


def columns(shape: tuple[int, ...]) -> int:
    """Return the number of columns of a weight of this shape; a vector has one."""
    return shape[1] if len(shape) == 2 else 1


def add_column_sums_(sums: torch.Tensor, piece: Piece) -> None:
    """Add the rows, or parts of rows, that this rank counts of a weight to the sums of its columns.

    Args:
        sums: (columns,) float64 on the device of the piece, changed in place.
        piece: this rank's piece of the weight.
    """
    for first, rows in _rows(piece, piece.counted, piece.counted_start):
        sums[first : first + rows.shape[1]] += rows.double().sum(0)


def subtract_from_rows_(flat: torch.Tensor, start: int, piece: Piece, row: torch.Tensor) -> None:
    """Subtract `row` from each row, or part of a row, in a flat range of a slice.

    Args:
        flat: (elements,) of any copy of the slice, changed in place.
        start: the index in the flattened slice of the first element of `flat`.
        piece: a piece of the slice.
        row: (columns of the full weight,), of any dtype and device.
    """
    row = row.to(flat.device, flat.dtype)
    for first, rows in _rows(piece, flat, start):
        rows.sub_(row[first : first + rows.shape[1]])


def _rows(piece: Piece, flat: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield views (rows, columns) that cover a flat range of the piece's slice, each after its first column's index
    in the full weight.
    """
    part = piece.slice
    first, width = (part.first, part.length) if part.dim == 1 else (0, columns(part.shape))
    end, middle = flat[: -start % width], flat[-start % width :]
    whole = len(middle) // width
    if len(end):
        yield first + start % width, end.unsqueeze(0)
    # A block is as large as the device works on fastest.
    for rows in middle[: whole * width].view(-1, width).split(max(1, CHUNK[flat.device.type] // width)):
        yield first, rows
    if len(middle) > whole * width:
        yield first, middle[whole * width :].unsqueeze(0)
