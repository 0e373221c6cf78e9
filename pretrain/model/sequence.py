"""Sequence parallelism (Ulysses): ranks that hold consecutive slices of the same sequences.

Everything in a decoder but attention looks at one token at a time, so a rank computes its slice by itself. Attention looks
at all tokens but at one head at a time. So the ranks exchange tokens for heads before it, and heads for tokens after it:

              tokens 0..7     tokens 8..15                     heads 0, 1      heads 2, 3
    rank 0  [ all 4 heads ]                      rank 0      [ all 16 tokens ]
    rank 1                  [ all 4 heads ]      rank 1                      [ all 16 tokens ]

Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch

Attention = Callable[..., tuple[torch.Tensor, Any]]


class Sliced(NamedTuple):
    """A rank's slice of a micro-batch: inputs, targets and positions, (sequences, seq_len / ranks) int64 each."""

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


@dataclass
class SequenceRanks:
    """One rank's place among those that share a sequence.

    Attributes:
        rank: its number among them, from 0 on. It holds slice number `rank`.
        size: the number of these ranks.
        exchange: sends `sent[r]` to rank r and returns what the ranks have sent to this one, in their order: tensors of one
            shape on all of them. Differentiable. Collective.
        whole: this pass runs on whole sequences, the same on every rank, and nothing is exchanged.
    """

    rank: int
    size: int
    exchange: Callable[[torch.Tensor], torch.Tensor]
    whole: bool = False

    def slice_of(self, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None) -> Sliced:
        """Return this rank's slice of whole sequences, whose targets are shifted already.

        Args:
            inputs: (sequences, seq_len) int64.
            targets: (sequences, seq_len) int64.
            positions: (sequences, seq_len) int64, None: each sequence counts from 0.
        """
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
        return Sliced(*(each.chunk(self.size, dim=1)[self.rank] for each in (inputs, targets, positions)))

    @contextmanager
    def on_whole_sequences(self) -> Iterator[None]:
        """Exchange nothing while the context is open."""
        self.whole = True
        try:
            yield
        finally:
            self.whole = False

    def heads_for_tokens(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Return all tokens of a share of the heads of each part, in one exchange.

        Args:
            parts: (sequences, heads, seq_len / ranks, head_dim) each, queries, keys and values. The ranks divide the heads.

        Returns:
            (sequences, heads / ranks, seq_len, head_dim) each.
        """
        sent = torch.cat([part.unflatten(1, (self.size, -1)).transpose(0, 1) for part in parts], dim=2)
        received = self.exchange(sent.contiguous()).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return list(received.split([part.shape[1] // self.size for part in parts], dim=1))

    def tokens_for_heads(self, part: torch.Tensor) -> torch.Tensor:
        """Return all heads of this rank's slice: the inverse of `heads_for_tokens`, in the order of attention's output.

        Args:
            part: (sequences, seq_len, heads / ranks, head_dim).

        Returns:
            (sequences, seq_len / ranks, heads, head_dim).
        """
        sent = part.unflatten(1, (self.size, -1)).transpose(0, 1)
        return self.exchange(sent.contiguous()).permute(1, 2, 0, 3, 4).flatten(2, 3)


def over_slices(attend: Attention, ranks: SequenceRanks, repeats: int) -> Attention:
    """Return an attention function of transformers' kind that attends to whole sequences, given slices of them.

    Args:
        attend: the function that attends to whole sequences.
        ranks: the ranks that hold the slices.
        repeats: how often each head of keys and values is repeated, so that the ranks divide their number.
    """

    def attend_over_slices(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, Any]:
        if repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        if ranks.whole:
            return attend(module, query, key, value, attention_mask, **more)
        query, key, value = ranks.heads_for_tokens(query, key, value)
        found, _ = attend(module, query, key, value, attention_mask, **more)
        return ranks.tokens_for_heads(found), None

    return attend_over_slices


def repeats_of_heads(heads: int, ranks: int) -> int:
    """Return how often each of `heads` is repeated so that `ranks` divides their number."""
    return lcm(heads, ranks) // heads
