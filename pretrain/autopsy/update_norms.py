"""Norms of the gradient and of the last step of each weight, from the memory of this rank: no copies, no communication.

The base optimizer steps flat tensors that hold this rank's masters. Its moments have the same layout. So have the
gradients that DeepSpeed has averaged over ranks and micro-batches when its own step begins. They are neither clipped nor
rejected then, and Muon has not turned them into updates (under ZeRO-1 it has, except in bf16: see `known`).

A step is W <- (1 - h d) W - h U, where h is the learning rate and d the weight decay. The optimizer's file reads U back
right after the step (`Algorithm.directions`). With the W after the step:

    dW = -h (d W + U) / (1 - h d)

Of an optimizer that has no file in `pretrain/optimizers/`, and of one that cannot tell, steps are not known.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from pretrain.model.layout import Weight
from pretrain.optimizers import Algorithm, algorithm_of
from pretrain.sharded.stepped_tensors import averaged_gradients, base_optimizer, stepped_tensors
from pretrain.sharded.weights import ShardedWeights
from pretrain.sharded.zero12 import Zero12

# Elements whose steps are computed at a time; they are in memory twice. On a CPU they stay in its cache.
BATCH = {"cpu": 1 << 17, "cuda": 1 << 25}


@dataclass
class _Pieces:
    """Pieces of this rank, or parts of them, in a flat tensor.

    Attributes:
        numbers: the index of each piece among all of this rank.
        ranges: the elements [first, last) of the flat tensor that count.
    """

    numbers: list[int] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, number: int, first: int, last: int) -> None:
        self.numbers.append(number)
        self.ranges.append((first, last))

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the numbers as an index on the device. Make it once: sending it to a GPU waits for the GPU."""
        return torch.tensor(self.numbers, device=device)


@dataclass
class _Flat:
    """One tensor that the base optimizer steps, its parameter group, and the pieces in it."""

    tensor: torch.Tensor
    group: dict[str, Any]
    pieces: _Pieces = field(default_factory=_Pieces)

    def __post_init__(self) -> None:
        self.device = self.tensor.device

    @cached_property
    def whole(self) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """The index of all pieces and their ranges."""
        return self.pieces.on(self.device), self.pieces.ranges

    @cached_property
    def batches(self) -> list[tuple[torch.Tensor, list[tuple[int, int]]]]:
        """The same, at most BATCH elements at a time. Long pieces come in parts."""
        return [(some.on(self.device), some.ranges) for some in _batches(self.pieces, BATCH[self.device.type])]


class UpdateNorms:
    """Measures the gradients and steps of this rank's pieces. Sums of squares over all ranks are those of the full weights.

    Attributes:
        names: the weight of each piece, in the order of the values that the methods return.
    """

    def __init__(self, weights: ShardedWeights) -> None:
        self._weights, self._base = weights, base_optimizer(weights)
        self._algorithm = algorithm_of(self._base)
        self._flats = [_Flat(tensor, group) for tensor, group in stepped_tensors(weights)]
        self.names: list[str] = []
        self._find_pieces(weights)
        self._of_tensor = {id(flat.tensor): flat for flat in self._flats}
        self._steps = self._nothing(2)
        self._unread: set[str] = set()
        self._base.register_step_post_hook(self._read_back)

    def known(self, weight: Weight) -> tuple[bool, bool]:
        """Return whether the gradient of a weight, and whether its step, can be measured on this engine."""
        if self._algorithm is None:
            return True, False
        algorithm = self._algorithm.of_weight(weight)
        replaced = algorithm.replaces_gradients and isinstance(self._weights.placement, Zero12)
        return not replaced, algorithm.name not in self._unread

    @torch.no_grad()
    def gradient_squares(self) -> torch.Tensor:
        """Return the squared norm of each piece's gradient before clipping.

        Call it between the last backward and the engine's step. Nothing waits for the device.

        Returns:
            (pieces,) float64 on the device of the optimizer.
        """
        engine = self._weights.engine
        scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
        self._steps, squares = self._nothing(2), self._nothing(1)[0]
        for number, flat in enumerate(self._flats):
            if flat.pieces.numbers:
                where, ranges = flat.whole
                _add_squares(squares, where, list(_cut(averaged_gradients(self._weights, number, flat.tensor), ranges)))
        return squares / scale**2

    @torch.no_grad()
    def step_squares(self) -> torch.Tensor:
        """Return the squared norms of the last step of each piece, and of the piece after it.

        Call it after the engine's step.

        Returns:
            (pieces, 2) float64 on the device of the optimizer. 0 for pieces that were not stepped; steps that are not
            known are 0 too.
        """
        return self._steps.T

    @torch.no_grad()
    def _read_back(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Measure what the optimizer has just stepped. DeepSpeed calls it for some of the tensors at a time."""
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                flat = self._of_tensor.get(id(tensor))
                if flat is not None and tensor.grad is not None:
                    self._measure(flat, group)

    def _measure(self, flat: _Flat, group: dict[str, Any]) -> None:
        algorithm = self._algorithm and self._algorithm.of_group(group)
        for where, ranges in flat.batches:
            masters = _parts(flat.tensor.data, ranges)
            _add_squares(self._steps[1], where, masters)
            directions = algorithm and _directions(algorithm, flat.tensor, self._base.state, group, ranges)
            if directions:
                rate, decay = group["lr"], group["weight_decay"]
                if decay:
                    torch._foreach_add_(directions, masters, alpha=decay)
                _add_squares(self._steps[0], where, directions, rate / (1 - rate * decay))
            elif algorithm:
                self._unread.add(algorithm.name)

    def _find_pieces(self, weights: ShardedWeights) -> None:
        """Find the flat tensor of each piece, and the place in it, by the address of its master, which is a view of it."""
        flats = sorted((flat for flat in self._flats if flat.tensor.numel()), key=lambda flat: flat.tensor.data_ptr())
        starts = [flat.tensor.data_ptr() for flat in flats]
        for piece in weights.pieces():
            if piece.counted.numel():
                flat = flats[bisect_right(starts, piece.counted.data_ptr()) - 1]
                first = (piece.counted.data_ptr() - flat.tensor.data_ptr()) // flat.tensor.element_size()
                flat.pieces.add(len(self.names), first, first + piece.counted.numel())
                self.names.append(piece.name)

    def _nothing(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, len(self.names), dtype=torch.float64, device=self._flats[0].device)


def _add_squares(squares: torch.Tensor, where: torch.Tensor, parts: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """Add the squared norms of the parts, times scale², to `squares` at the places `where`."""
    norms = torch.stack(torch._foreach_norm(list(parts), 2, dtype=torch.float32)).double().mul_(scale)
    squares.index_add_(0, where, norms.square_())


def _parts(tensor: torch.Tensor, ranges: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Return the ranges of a tensor as views."""
    values = tensor.view(-1)
    return [values[first:last] for first, last in ranges]


def _directions(
    algorithm: Algorithm, tensor: torch.Tensor, states: Any, group: dict[str, Any], ranges: list[tuple[int, int]]
) -> list[torch.Tensor] | None:
    return algorithm.directions(tensor, states.get(tensor, {}), group, lambda each: _parts(each, ranges))


def _cut(tensors: Sequence[torch.Tensor], ranges: list[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """Yield the ranges of tensors laid end to end. No range crosses from one tensor into the next."""
    starts = list(accumulate((tensor.numel() for tensor in tensors), initial=0))
    for first, last in ranges:
        number = bisect_right(starts, first) - 1
        yield tensors[number].reshape(-1)[first - starts[number] : last - starts[number]]


def _batches(pieces: _Pieces, size: int) -> Iterator[_Pieces]:
    """Yield the pieces, at most `size` elements at a time."""
    some, left = _Pieces(), size
    for number, (first, last) in zip(pieces.numbers, pieces.ranges, strict=True):
        while first < last:
            stop = min(last, first + left)
            some.add(number, first, stop)
            left -= stop - first
            first = stop
            if not left:
                yield some
                some, left = _Pieces(), size
    if some.numbers:
        yield some
