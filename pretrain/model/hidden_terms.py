"""Terms of the loss on the residual stream after each block, which methods add to the cross-entropy.

    term = Σ over blocks l, Σ over tokens t that count, f(l, h_l,t)  /  number of tokens that count

The states are read by hooks while the forward pass runs and are part of its graph, so gradients flow through them whatever
is recomputed. f is computed again in the backward pass: kept are only the states, which the next block keeps anyway. Every
rank of a tensor-parallel group has the whole stream, and ranks that share a sequence have their slices of it, as of the
targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from pretrain.model.layout import blocks_of


@dataclass(frozen=True)
class HiddenTerm:
    """A term of the loss that is a mean over the tokens that count of a function of their states, summed over blocks.

    Attributes:
        of_hidden: maps a block, counted from 1, and (tokens, hidden_size) float32 states after it to (tokens,). The
            coefficient is part of it.
    """

    of_hidden: Callable[[int, torch.Tensor], torch.Tensor]


def after_blocks(model: torch.nn.Module, note: Callable[[int, torch.Tensor], None]) -> list[RemovableHandle]:
    """Have `note` called with the block, from 1, and the residual stream after it, (batch, seq_len, hidden_size).

    Returns:
        The handles of the hooks, one for each block.
    """

    def hook(layer: int) -> Callable[[torch.nn.Module, tuple, torch.Tensor | tuple], None]:
        def record(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            note(layer, output if isinstance(output, torch.Tensor) else output[0])

        return record

    return [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks_of(model), start=1)]


@contextmanager
def hidden_states(model: torch.nn.Module, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Append the state after each block to the yielded list in a forward pass in this context, if `wanted`."""
    states: list[torch.Tensor] = []
    handles = after_blocks(model, lambda _, state: states.append(state)) if wanted else []
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()  # so that recomputation in the backward pass appends nothing


def with_hidden_terms(
    losses: dict[str, torch.Tensor],
    terms: Mapping[str, HiddenTerm],
    states: Sequence[torch.Tensor],
    counts: torch.Tensor,
    divisor: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return the losses with the terms added to `total` and listed by name, without gradients there.

    Args:
        losses: as `LossHead` returns them.
        terms: the terms, by name.
        states: the state after each block, (batch, seq_len, hidden_size) each.
        counts: (batch, seq_len) bool, whether the token's target counts.
        divisor: a scalar, as in `LossHead.forward`.
    """
    for name, term in terms.items():
        by_block = [
            checkpoint(_sum_over_tokens, term, layer, state, counts, use_reentrant=False, preserve_rng_state=False)
            for layer, state in enumerate(states, start=1)
        ]
        value = torch.stack(by_block).sum() / divisor
        losses = {**losses, "total": losses["total"] + value, name: value.detach()}
    return losses


def _sum_over_tokens(term: HiddenTerm, layer: int, state: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (term.of_hidden(layer, state.float().flatten(0, 1)) * counts.flatten()).sum()
