"""State that methods keep besides the weights, such as power-iteration vectors: one file of each checkpoint."""

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
    """Write the state of the methods into the checkpoint `folder`. Without state there is no file."""
    tensors: dict[str, torch.Tensor] = {}
    for method in methods:
        tensors |= method.state(model)
    if tensors:
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_bytes(folder / _FILE, content)


def load_method_state(folder: Path, methods: Sequence[Method], model: torch.nn.Module) -> None:
    """Load the stored state of all methods into every method. Without a file, the state is empty."""
    state = read_method_state(folder)
    for method in methods:
        method.load_state(model, state)


def read_method_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the stored tensors by name, empty without a file. Raises UserError if the file cannot be read."""
    path = folder / _FILE
    return read_tensors(path) if path.exists() else {}
