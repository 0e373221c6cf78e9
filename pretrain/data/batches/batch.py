"""What a model trains on in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_TARGET = -100  # what torch's cross-entropy leaves out


@dataclass(frozen=True)
class MicroBatch:
    """inputs, targets: (sequences, seq_len) int64 token ids; a target of NO_TARGET does not count. positions: the same
    shape, int64, starting at 0 again with every document that attention must not leave; None: one document a sequence.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """The batch on `device`; the copy overlaps with computation where the memory is pinned."""
        moved = (None if part is None else part.to(device, non_blocking=True) for part in self._parts())
        return MicroBatch(*moved)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.inputs, self.targets, self.positions
