"""The part of a weight that a rank owns, under data sharding (ZeRO) on top of tensor parallelism (AutoTP).

AutoTP first cuts a weight into slices, one for each tensor-parallel rank: whole rows (column-parallel layers), whole
columns (row-parallel layers), or everything (replicated). ZeRO then flattens the slice and gives each data-parallel
rank a contiguous range of it:

    full weight (6 x 4)          slice of TP rank 1         piece of the second of two data-parallel ranks
    . . x x      columns 2, 3    x x                        flattened slice [6:12]
    . . x x      (row-parallel)  x x  ... 12 elements
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from pretrain.errors import UserError
from pretrain.model.layout import full_shape


@dataclass(frozen=True)
class Slice:
    """The part of a weight that a tensor-parallel rank computes with: elements [first, last) along one dimension.

    Attributes:
        shape: the shape of the full weight.
        dim: the dimension that is cut, or None where the slice is the whole weight.
        first: the first row or column of the slice. It has no meaning where `dim` is None.
        last: the row or column after its last one. It has no meaning where `dim` is None.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    first: int = 0
    last: int = 0

    @property
    def numel(self) -> int:
        """The number of elements in the slice."""
        return prod(self.shape) if self.dim is None else prod(self.shape) // self.shape[self.dim] * self.length

    @property
    def length(self) -> int:
        """The number of rows or columns in the slice, along `dim`."""
        return self.last - self.first

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """Return this slice of a full weight, as a view."""
        return full if self.dim is None else full.narrow(self.dim, self.first, self.length)


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one weight, owned by this rank. It may be empty, and it never holds padding.

    Attributes:
        name: the weight's name in the model.
        slice: the tensor-parallel slice that the piece is cut from.
        start: the index in the flattened slice of the first owned element.
        master: (owned elements,) float32 view of the optimizer's copy. Writing to it changes the optimizer's state.
        counted_start: the index in the flattened slice of the first element of `counted`.
        counted: (counted elements,) the part of `master` that this rank contributes to statistics. Where several ranks
            own the same elements, each counts its share of them.
    """

    name: str
    slice: Slice
    start: int
    master: torch.Tensor
    counted_start: int
    counted: torch.Tensor


def make_piece(name: str, part: Slice, start: int, master: torch.Tensor, replicas: int, replica: int) -> Piece:
    """Return the piece of one of several ranks that own the same elements.

    Args:
        name: the weight's name in the model.
        part: the tensor-parallel slice that the piece is cut from.
        start: the index in the flattened slice of the first owned element.
        master: (owned elements,) float32 view of the optimizer's copy.
        replicas: the number of ranks that own these same elements.
        replica: the number of the one among them that gets the piece, from 0 on.
    """
    first, last = (master.numel() * n // replicas for n in (replica, replica + 1))
    return Piece(name, part, start, master, start + first, master[first:last])


def tensor_slice(parameter: torch.nn.Parameter, name: str) -> Slice:
    """Return the slice of a weight that this rank's parameter holds, from the metadata that AutoTP attaches to it.

    Args:
        parameter: this rank's parameter.
        name: the name of its weight, for the error.

    Raises:
        UserError: for a weight that AutoTP cuts in more than one place (a fused query-key-value matrix).
    """
    metadata = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if not metadata or metadata["replicated"] or metadata["partition_dim"] is None:
        return Slice(full_shape(parameter))
    if metadata["sub_param_sizes"] is not None:
        raise UserError(
            f"tensor parallelism cuts the fused weight {name} in several places, which the arithmetic on sharded "
            "weights does not follow. Use a model with separate matrices, or parallel.tensor 1."
        )
    from deepspeed.utils import groups

    rank, lengths = groups.get_tensor_model_parallel_rank(), metadata["partition_sizes"]
    first = sum(lengths[:rank])
    return Slice(full_shape(parameter), metadata["partition_dim"], first, first + lengths[rank])
