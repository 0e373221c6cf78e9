"""The micro-batch: sequences that a model trains on in one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch

NO_TARGET = -100  # what torch's cross-entropy leaves out


class MicroBatch(NamedTuple):
    """Sequences of seq_len + 1 tokens, of which the first seq_len are inputs and the last seq_len are targets.

    Attributes:
        tokens: (sequences, seq_len + 1) ids, int64 after `to`. Until then they are as narrow as they are stored: the
            less there is to read, pin and copy.
        counted: (sequences, seq_len) bool, which targets count; None: all.
        positions: (sequences, seq_len) int64, starting at 0 again with every document that attention must not leave;
            None: a sequence is one stretch of text.
    """

    tokens: torch.Tensor
    counted: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @property
    def inputs(self) -> torch.Tensor:
        """The input ids, (sequences, seq_len) int64."""
        return self.tokens[:, :-1].long()

    @property
    def targets(self) -> torch.Tensor:
        """The target ids, (sequences, seq_len) int64; NO_TARGET where nothing is to be predicted."""
        following = self.tokens[:, 1:].long()
        return following if self.counted is None else torch.where(self.counted, following, NO_TARGET)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the batch on `device`; the copy overlaps with computation where the memory is pinned."""
        return MicroBatch(
            self.tokens.to(device, non_blocking=True).long(),
            None if self.counted is None else self.counted.to(device, non_blocking=True),
            None if self.positions is None else self.positions.to(device, non_blocking=True),
        )
