"""Means over the rows of a matrix of which each rank has a flat range that may begin and end within a row.

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
    """The columns of a weight of that shape; a vector is a matrix of one."""
    return shape[1] if len(shape) == 2 else 1


def add_column_sums_(sums: torch.Tensor, piece: Piece) -> None:
    """Add what this rank counts of a weight to `sums`, (columns,) float64 on the device of the piece."""
    for first, rows in _rows(piece, piece.counted, piece.counted_start):
        sums[first : first + rows.shape[1]] += rows.double().sum(0)


def subtract_from_rows_(flat: torch.Tensor, start: int, piece: Piece, row: torch.Tensor) -> None:
    """Subtract `row`, (columns,) of the full weight, from each row of a flat range of the piece's slice.

    flat: a range of the slice, from its element `start` on; of any copy of it.
    """
    row = row.to(flat.device, flat.dtype)
    for first, rows in _rows(piece, flat, start):
        rows.sub_(row[first : first + rows.shape[1]])


def _rows(piece: Piece, flat: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Views of a flat range of the piece's slice as (rows, columns), each with its first column in the full weight."""
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
