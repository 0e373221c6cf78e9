"""Files of `torch.save` opened without reading their tensors.

A file is read with its tensors on the meta device: they have shapes and the places of their bytes, and nothing more.
Objects of other libraries (such as DeepSpeed's loss scaler) become placeholders, so those libraries are not needed, and no
code that the file names is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.safe_load import read_safely
from pretrain.errors import UserError

_BLOCK = 1 << 20  # elements


@dataclass(frozen=True)
class Span:
    """A range of `count` float32 values from byte `offset` on in `file`."""

    file: Path
    offset: int
    count: int


@dataclass(frozen=True)
class StoredWeight:
    """A float32 tensor of shape `shape`, the concatenation of `spans`. Calling it reads it."""

    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def __call__(self) -> torch.Tensor:
        """Read and return the whole weight, float32. Raise UserError if a file ends too early."""
        weight = torch.empty(self.shape, dtype=torch.float32)
        flat = weight.view(-1)
        for span in self.spans:
            _read_into(flat[: span.count], span)
            flat = flat[span.count :]
        return weight

    def blocks(self) -> Iterator[Span]:
        """Yield the same values in the same order, in spans of limited size."""
        for span in self.spans:
            for first in range(0, span.count, _BLOCK):
                count = min(_BLOCK, span.count - first)
                yield Span(span.file, span.offset + 4 * first, count)


@dataclass(frozen=True)
class SideBySide:
    """A float32 matrix whose columns lie in several stored matrices, next to each other. Calling it reads it."""

    parts: tuple[StoredWeight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts))

    def __call__(self) -> torch.Tensor:
        """Read and return the whole matrix, float32; besides it, memory holds one block. Raise UserError as its parts do."""
        whole, column = torch.empty(self.shape, dtype=torch.float32), 0
        for part in self.parts:
            width, position = part.shape[1], 0
            for values in map(_read, part.blocks()):
                place = torch.arange(position, position + len(values))
                whole[place // width, column + place % width] = values
                position += len(values)
            column += width
        return whole


def one_below_the_other(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Return a weight whose rows lie in several stored ones, one after the other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StoredWeight(shape, tuple(span for part in parts for span in part.spans))


def open_stored(path: Path) -> Any:
    """Return the content of `path`, with its tensors on the meta device. Raise UserError if torch cannot read it."""
    return read_safely(path, device="meta", stand_in=_Placeholder)


def span(path: Path, tensor: torch.Tensor, start: int = 0, count: int | None = None) -> Span:
    """Return the place of elements of a tensor on disk.

    Args:
        path: The file.
        tensor: A contiguous float32 tensor of `open_stored(path)`.
        start: The first element.
        count: How many; None for all.

    Raises:
        UserError: If the tensor is not contiguous, not float32, or too short.
    """
    count = tensor.numel() if count is None else count
    if not tensor.is_contiguous():
        raise UserError(f"{path} holds a weight whose values do not lie in order, which conversion cannot read.")
    if tensor.dtype != torch.float32 or start + count > tensor.numel():
        raise UserError(f"{path} holds {tensor.numel()} {tensor.dtype} values where {start + count} float32 were due.")
    beginning = tensor.untyped_storage()._checkpoint_offset
    assert beginning is not None  # torch.load sets it for tensors that it leaves on disk
    return Span(path, beginning + tensor.element_size() * (int(tensor.storage_offset()) + start), count)


def _read(span: Span) -> torch.Tensor:
    values = torch.empty(span.count, dtype=torch.float32)
    _read_into(values, span)
    return values


def _read_into(values: torch.Tensor, span: Span) -> None:
    with open(span.file, "rb") as file:
        file.seek(span.offset)
        if file.readinto(values.numpy().data) != values.nbytes:
            raise UserError(f"{span.file} ends before the weights that it should hold. Copy it again.")


class _Placeholder:
    """A stand-in for an object of another library."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...
