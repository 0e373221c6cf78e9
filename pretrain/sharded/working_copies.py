"""The working copies of one weight that this rank holds between steps."""

from __future__ import annotations

import torch

from pretrain.sharded.piece import Piece


def resident_copy(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the working copy that holds all of a weight, or of its tensor-parallel slice; None if there is none."""
    cut = hasattr(parameter, "ds_tensor") and parameter.ds_status.name != "AVAILABLE"  # type: ignore[attr-defined]  # ZeRO-3's
    return None if cut else parameter.data


def working_copies(parameter: torch.nn.Parameter, piece: Piece) -> list[torch.Tensor]:
    """Return the elements of `piece`, a piece of `parameter`, in each working copy that this rank holds: flat tensors."""
    owned = piece.master.numel()
    copies = []
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3's range
        copies.append(parameter.ds_tensor.data[:owned])
    whole = resident_copy(parameter)
    if whole is not None:
        copies.append(whole.view(-1)[piece.start : piece.start + owned])
    return copies
