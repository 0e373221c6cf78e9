"""Files of `torch.save` opened without reading their tensors.

A file is read with its tensors on the meta device: they have shapes and the places of their bytes, and nothing more.
Objects of other libraries (such as DeepSpeed's loss scaler) become placeholders, so those libraries are not needed, and no
code that the file names is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.safe_load import read_safely
from pretrain.errors import UserError
from pretrain.files import patiently


@dataclass(frozen=True)
class Span:
    """A range of `count` values of a float dtype from byte `offset` on in `file`."""

    file: Path
    offset: int
    count: int
    dtype: torch.dtype = torch.float32

    def part(self, start: int, count: int) -> Span:
        """Return the span of `count` of these values, from number `start` on."""
        return Span(self.file, self.offset + self.dtype.itemsize * start, count, self.dtype)


def open_stored(path: Path) -> Any:
    """Return the content of `path`, with its tensors on the meta device. Raise UserError if torch cannot read it."""
    return read_safely(path, device="meta", stand_in=_Placeholder)


def span(path: Path, tensor: torch.Tensor, start: int = 0, count: int | None = None) -> Span:
    """Return the place of elements of a tensor on disk.

    Args:
        path: the file.
        tensor: a contiguous float32 tensor of `open_stored(path)`.
        start: the first element.
        count: how many; None for all.

    Raises:
        UserError: the tensor is not contiguous, not float32, or too short.
    """
    count = tensor.numel() if count is None else count
    if not tensor.is_contiguous():
        raise UserError(f"{path} holds a weight whose values do not lie in order, which cannot be read.")
    if tensor.dtype != torch.float32 or start + count > tensor.numel():
        raise UserError(f"{path} holds {tensor.numel()} {tensor.dtype} values where {start + count} float32 were due.")
    beginning = tensor.untyped_storage()._checkpoint_offset
    assert beginning is not None  # torch.load sets it for tensors that it leaves on disk
    return Span(path, beginning + tensor.element_size() * (int(tensor.storage_offset()) + start), count)


def read_span(where: Span, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read and return the values of a span, float32 whatever their dtype in the file.

    Args:
        where: the span.
        out: (count,) contiguous float32 on the CPU, to read into. None for new memory.

    Raises:
        UserError: the file ends before them, or cannot be read.
    """
    values = torch.empty(where.count, dtype=torch.float32) if out is None else out
    raw = values if where.dtype == torch.float32 else torch.empty(where.count, dtype=where.dtype)
    content = raw.view(torch.uint8).numpy().data if where.count else b""

    def read() -> int:
        with open(where.file, "rb") as file:
            file.seek(where.offset)
            return file.readinto(content) if where.count else 0

    try:
        found = patiently(read, f"reading {where.file}")
    except OSError as error:
        raise UserError(f"{where.file} cannot be read: {error}.") from error
    if found != raw.nbytes:
        raise UserError(f"{where.file} ends before the weights that it should hold. Copy it again.")
    return values if raw is values else values.copy_(raw)


class _Placeholder:
    """A stand-in for an object of another library, with its plain attributes."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)
