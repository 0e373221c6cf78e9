"""The weights that a conversion exports: those of the last step, their running average, or a mean over checkpoints.

Each comes with the logits that the trainer's own model has for them. Of the first two the trainer has stored them. Those of
a mean are computed here by the trainer's modules, before any method is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from pretrain.checkpoints.logit_probe import has_probe, load_probe, probe_logits
from pretrain.checkpoints.method_state import read_method_state
from pretrain.checkpoints.stored import StoredTensor, master_weights, stored_weights
from pretrain.config.schema import Config, load_config
from pretrain.data.json_files import read_json
from pretrain.engine.build_model import build_model
from pretrain.errors import UserError
from pretrain.export.proof import checked
from pretrain.model.export_edits import LazyTensors
from pretrain.model.reparameterization import SCALE, Reparameterized
from pretrain.sharded.stepped_tensors import AVERAGE

STAGE_0 = {"zero_optimization": {"stage": 0}}


@dataclass(frozen=True)
class Source:
    """Weights to export.

    Attributes:
        tensors: each fp32 weight by its name in the trained model.
        words: what they are, for the model card.
        probe: the input ids of the proof, and the trainer's logits; None where `trainer_logits` must compute these.
    """

    tensors: LazyTensors
    words: str
    probe: tuple[torch.Tensor, torch.Tensor] | None


def source_of(checkpoint: Path, *, ema: bool, others: Sequence[Path]) -> Source:
    """Return the weights to export of a verified checkpoint.

    Args:
        checkpoint: the checkpoint.
        ema: take the average that the trainer has kept.
        others: verified checkpoints to average with this one, of the same model.

    Raises:
        UserError: there is no such average, or the checkpoints are not of one model.
        NotEqualError: a checkpoint lacks a weight that its trainer had.
    """
    if ema:
        return _running_average(checkpoint)
    step = read_json(checkpoint / "trainer.json")["step"]
    mine = checked(dict(master_weights(checkpoint / "deepspeed")), checkpoint)
    if not others:
        return Source(mine, f"those of step {step:,}", load_probe(checkpoint))
    all_of_them = [mine, *(_like(checkpoint, other) for other in others)]
    steps = [step, *(read_json(other / "trainer.json")["step"] for other in others)]
    tensors: LazyTensors = {name: _Mean([each[name] for each in all_of_them]) for name in mine}
    return Source(tensors, f"the mean of those of steps {', '.join(f'{each:,}' for each in steps)}", None)


def _running_average(checkpoint: Path) -> Source:
    folder = checkpoint / AVERAGE
    if not (folder.is_dir() and has_probe(folder)):
        raise UserError(
            f"{checkpoint} holds no average of the weights: the run file had no 'ema', or no step had been taken."
        )
    stored = stored_weights(checkpoint / "deepspeed")
    tensors: dict[str, StoredTensor] = {name: weight.moments[AVERAGE] for name, weight in stored.items()}
    decay = load_config(checkpoint / "config.yaml").ema
    assert decay is not None
    words = f"the exponential moving average up to this step, decay {decay.decay:g}"
    return Source(checked(dict(tensors), folder), words, load_probe(folder))


def _like(checkpoint: Path, other: Path) -> LazyTensors:
    """Return the weights of `other`; UserError unless it is of the same model as `checkpoint`."""
    mine, its = (load_config(path / "config.yaml") for path in (checkpoint, other))
    for key in ("model", "methods"):
        if getattr(mine, key) != getattr(its, key):
            raise UserError(
                f"{checkpoint} and {other} cannot be averaged: their '{key}' differ. Only checkpoints of one model can."
            )
    return checked(dict(master_weights(other / "deepspeed")), other)


@dataclass(frozen=True)
class _Mean:
    """Loads the mean of a weight over checkpoints, one after the other, summed in float64. Returns float32."""

    loads: Sequence

    def __call__(self) -> torch.Tensor:
        total = self.loads[0]().double()
        for load in self.loads[1:]:
            total += load()
        return (total / len(self.loads)).float()


@torch.no_grad()
def trainer_logits(
    checkpoint: Path, config: Config, hf_config: PreTrainedConfig, tensors: LazyTensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probe's input ids, and its logits by the trainer's own model with other weights.

    The model is in memory as a whole, in the precision that the trainer computed in.

    Args:
        checkpoint: a checkpoint of the model, whose probe and method state are used.
        config: its run, with methods that are bound.
        hf_config: the configuration of the trained model.
        tensors: each fp32 weight by its name in the trained model.
    """
    input_ids, logits = load_probe(checkpoint)
    model = build_model(config, hf_config, STAGE_0)
    for name, parameter in model.named_parameters():
        value = tensors[name]()
        parameter.data = value.to(logits.dtype)
        module = model.get_submodule(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        if isinstance(module, Reparameterized) and logits.dtype != torch.float32:
            module.exact_scale = value
    model.tie_weights()
    state = read_method_state(checkpoint)
    for method in config.methods:
        method.load_state(model, state)
    return input_ids, probe_logits(model, input_ids)
