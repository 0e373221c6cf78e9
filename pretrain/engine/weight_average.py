"""The exponential moving average of the weights, on shards:  A <- d A + (1 - d) W  after each step that is taken.

A is float32 and lies in the optimizer's state beside the moments, with the layout of the masters. So a rank averages its
own pieces without communication, and A is saved, resumed and carried to other layouts as the moments are. It begins as the
weights after the first step, because torch's optimizers make their state only where they find none.

Source: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; with exponential weights as in
Tarvainen and Valpola 2017 (arXiv 1703.01780).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pretrain.methods import Method
from pretrain.sharded import ShardedWeights
from pretrain.sharded.draws import CHUNK
from pretrain.sharded.stepped_tensors import AVERAGE, base_optimizer, state_of, stepped_tensors


class WeightAverage:
    """The average of an engine's weights. Without a decay there is none, and one that a checkpoint brings is dropped."""

    def __init__(self, weights: ShardedWeights, methods: Sequence[Method], decay: float | None) -> None:
        """Bind to the weights of an engine and the methods of its run. decay: d."""
        self.weights, self.methods, self.decay = weights, methods, decay

    @property
    def begun(self) -> bool:
        """Whether there is an average yet: the same on every rank."""
        state = base_optimizer(self.weights).state
        return any(AVERAGE in state.get(flat, ()) for flat, _ in stepped_tensors(self.weights))

    def loaded(self) -> None:
        """Take note that a checkpoint has been loaded, with or without an average. Local."""
        if self.decay is None:
            for state in base_optimizer(self.weights).state.values():
                state.pop(AVERAGE, None)

    @torch.no_grad()
    def update(self) -> None:
        """Average in the present weights. Local. Call it once after each step that was taken, when methods have acted."""
        if self.decay is None:
            return
        state = base_optimizer(self.weights).state
        for flat, _ in stepped_tensors(self.weights):
            if AVERAGE in state[flat]:
                state[flat][AVERAGE].lerp_(flat.data, 1 - self.decay)
            else:
                state[flat][AVERAGE] = flat.data.clone()

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let forward compute with the average. Collective at both ends. The weights come back to the last bit.

        An exception leaves the average in place, because putting the weights back needs all ranks: the run must end then.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange masters and averages, and let the working copies follow."""
        names = set(self.weights.layout)
        for piece in self.weights.placement.edit(names):
            if not piece.master.numel():
                continue
            state, place = state_of(self.weights, piece.master)
            average = state[AVERAGE].view(-1)[place : place + piece.master.numel()]
            for ours, its in zip(piece.master.split(CHUNK), average.split(CHUNK), strict=True):
                kept = ours.clone()
                ours.copy_(its)
                its.copy_(kept)
        self.weights.placement.refresh(names)
        for method in self.methods:
            method.follow(self.weights)
