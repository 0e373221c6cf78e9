"""Norms of the gradient and of the last step of each weight, from the memory of this rank: no copies, no communication.

The base optimizer steps flat tensors that hold this rank's masters. Adam's moments have the same layout. So have the
gradients that DeepSpeed has averaged over ranks and micro-batches when its own step begins. They are neither clipped nor
rejected then, and Muon has not turned them into updates (under ZeRO-1 it has, except in bf16: see `known`).

AdamW's step follows from the state after it. Torch computes W <- (1 - h d) W - h U, where h is the learning rate, d
the weight decay, and U = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps). With the W after the step:

    dW = -h (d W + U) / (1 - h d)
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
from pretrain.optim import muon
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
        self._flats = [_Flat(tensor, group) for tensor, group in stepped_tensors(weights)]
        self.names: list[str] = []
        self._find_pieces(weights)

    def known(self, weight: Weight) -> tuple[bool, bool]:
        """Return whether the gradient of a weight, and whether its step, can be measured on this engine."""
        by_muon = muon.steps(weight) and any(group.get("use_muon") for group in self._base.param_groups)
        return not (by_muon and isinstance(self._weights.placement, Zero12)), not by_muon

    @torch.no_grad()
    def gradient_squares(self) -> torch.Tensor:
        """Return the squared norm of each piece's gradient before clipping.

        Call it between the last backward and the engine's step. Nothing waits for the device.

        Returns:
            (pieces,) float64 on the device of the optimizer.
        """
        engine = self._weights.engine
        scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        for number, flat in enumerate(self._flats):
            if flat.pieces.numbers:
                where, ranges = flat.whole
                _add_squares(squares, where, list(_cut(averaged_gradients(self._weights, number, flat.tensor), ranges)))
        return squares / scale**2

    @torch.no_grad()
    def step_squares(self) -> torch.Tensor:
        """Return the squared norms of the last step of each piece, and of the piece after it.

        Call it after the engine's step, before anything else changes the weights.

        Returns:
            (pieces, 2) float64 on the device of the optimizer. 0 for pieces that Adam does not step.
        """
        squares = torch.zeros(2, len(self.names), dtype=torch.float64, device=self._device)
        for flat in self._flats:
            state = self._base.state.get(flat.tensor, {})
            if "exp_avg" in state:
                rate, decay = flat.group["lr"], flat.group["weight_decay"]
                scale = rate * (decay or 1.0) / (1 - rate * decay)
                for where, ranges in flat.batches:
                    steps, masters = _adam_steps(flat, state, ranges)
                    _add_squares(squares[0], where, steps, scale)
                    _add_squares(squares[1], where, masters)
        return squares.T

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

    @property
    def _device(self) -> torch.device:
        return self._flats[0].device


def _add_squares(squares: torch.Tensor, where: torch.Tensor, parts: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """Add the squared norms of the parts, times scale², to `squares` at the places `where`."""
    norms = torch.stack(torch._foreach_norm(list(parts), 2, dtype=torch.float32)).double().mul_(scale)
    squares.index_add_(0, where, norms.square_())


def _adam_steps(
    flat: _Flat, state: dict[str, Any], ranges: list[tuple[int, int]]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Return W + U / d of each range (U without decay), in new memory, and W, as views."""
    masters, firsts, seconds = (
        [tensor.view(-1)[first:last] for first, last in ranges]
        for tensor in (flat.tensor.data, state["exp_avg"], state["exp_avg_sq"])
    )
    beta1, beta2 = flat.group["betas"]
    unbiased1, root2 = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]).sqrt()  # on the device: t is not read
    divisors = torch._foreach_sqrt(seconds)
    torch._foreach_add_(divisors, flat.group["eps"] * root2)
    torch._foreach_mul_(divisors, unbiased1 / root2)
    if decay := flat.group["weight_decay"]:
        return torch._foreach_addcdiv(masters, firsts, divisors, 1 / decay), masters
    return torch._foreach_div(firsts, divisors), masters


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
