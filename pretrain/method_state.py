"""What methods keep besides the weights (power-iteration vectors, say): one file of each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pretrain.methods import Method

_FILE = "method_state.safetensors"


def save_method_state(folder: Path, methods: Sequence[Method], model: torch.nn.Module) -> None:
    """Write what the methods keep into the checkpoint `folder`; no file where they keep nothing."""
    tensors: dict[str, torch.Tensor] = {}
    for method in methods:
        tensors |= method.state(model)
    if tensors:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / _FILE)


def load_method_state(folder: Path, methods: Sequence[Method], model: torch.nn.Module) -> None:
    """Give the methods back what they kept, every method that of all; nothing where the file is missing."""
    state = read_method_state(folder)
    for method in methods:
        method.load_state(model, state)


def read_method_state(folder: Path) -> dict[str, torch.Tensor]:
    """What was saved, by name; empty where the methods of the run keep nothing."""
    path = folder / _FILE
    return load_file(path) if path.exists() else {}
