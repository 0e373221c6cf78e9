"""What methods keep besides the weights (power-iteration vectors, say): one file of each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from pretrain.checkpoints.safe_load import read_tensors
from pretrain.files import write_bytes
from pretrain.methods import Method

_FILE = "method_state.safetensors"


def save_method_state(folder: Path, methods: Sequence[Method], model: torch.nn.Module) -> None:
    """Write what the methods keep into the checkpoint `folder`; no file where they keep nothing."""
    tensors: dict[str, torch.Tensor] = {}
    for method in methods:
        tensors |= method.state(model)
    if tensors:
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_bytes(folder / _FILE, content)


def load_method_state(folder: Path, methods: Sequence[Method], model: torch.nn.Module) -> None:
    """Give the methods back what they kept, every method that of all; nothing where the file is missing."""
    state = read_method_state(folder)
    for method in methods:
        method.load_state(model, state)


def read_method_state(folder: Path) -> dict[str, torch.Tensor]:
    """What was saved, by name; empty where the methods of the run keep nothing. UserError if it cannot be read."""
    path = folder / _FILE
    return read_tensors(path) if path.exists() else {}
