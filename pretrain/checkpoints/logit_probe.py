"""Figures of the trainer's model that a checkpoint stores, so that a conversion can be checked against them.

They are the logits on a fixed batch, over the full vocabulary at a few positions of every probe sequence to keep the file
small, and the moments of every full fp32 weight, because a small error in one weight changes the logits of a bf16 model
less than rounding does.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from pretrain.checkpoints.safe_load import read_tensors
from pretrain.files import write_bytes, write_json
from pretrain.sharded import Moments

SEQUENCES = 2
POSITIONS = 8
MAX_LENGTH = 256
_PROBE, _MOMENTS = "probe.safetensors", "moments.json"


def probe_batch(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Return (2, length) int64 token ids from the flat `tokens`, length at most 256."""
    length = min(seq_len, MAX_LENGTH, tokens.numel() // SEQUENCES)
    return tokens[: SEQUENCES * length].view(SEQUENCES, length).long()


@torch.no_grad()
def probe_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return logits at evenly spaced positions. Collective under ZeRO-3.

    The model is in evaluation mode for the pass. Attention masks and caches are left out.

    Args:
        model: the model, without a wrapper.
        input_ids: (2, length) int64, on the model's device.

    Returns:
        (2, positions, vocab_size) on the CPU, in the precision that the model computes in.
    """
    was_training = model.training
    model.eval()
    logits = model(input_ids, use_cache=False).logits[:, probe_positions(input_ids.shape[1])]
    model.train(was_training)
    return logits.cpu()


def probe_positions(length: int) -> torch.Tensor:
    """Return the positions whose logits are kept: evenly spaced up to the last."""
    return torch.linspace(0, length - 1, min(POSITIONS, length)).long()


def save_probe(folder: Path, input_ids: torch.Tensor, logits: torch.Tensor, moments: dict[str, Moments]) -> None:
    """Write `probe.safetensors` and `moments.json` into a checkpoint folder."""
    stored = {"input_ids": input_ids.cpu().contiguous(), "logits": logits.contiguous()}
    write_bytes(folder / _PROBE, save(stored))
    write_json(folder / _MOMENTS, {name: asdict(each) for name, each in moments.items()})


def has_probe(folder: Path) -> bool:
    """Return whether `save_probe` has written to this checkpoint folder."""
    return (folder / _PROBE).exists()


def load_probe(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, logits) as stored by `save_probe`. Raises UserError if they cannot be read."""
    stored = read_tensors(folder / _PROBE, "input_ids", "logits")
    return stored["input_ids"], stored["logits"]


def load_moments(folder: Path) -> dict[str, Moments]:
    """Return the moments of every weight as stored by `save_probe`."""
    stored = json.loads((folder / _MOMENTS).read_bytes())
    return {name: Moments(**fields) for name, fields in stored.items()}
