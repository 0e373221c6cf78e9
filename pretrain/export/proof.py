"""Proves an exported folder: stock transformers must give the logits that the trainer gave on the checkpoint's probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pretrain.probe import load_probe, probe_logits

# Largest |difference| that is still equality, as a share of the largest |logit|, by the coarser of the precision that
# the trainer computes in and the one that was exported. docs/conversion.md has the measurements behind them.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class NotEqualError(RuntimeError):
    """The exported model does not compute what the trainer computed."""


@dataclass(frozen=True)
class Proof:
    """The exported model's logits against the trainer's, both in the trainer's precision."""

    largest_difference: float
    largest_logit: float
    precision: torch.dtype
    tolerance: float

    @property
    def holds(self) -> bool:
        """False as well where a logit is not a number."""
        return self.largest_difference <= self.tolerance * self.largest_logit

    def __str__(self) -> str:
        return (
            f"largest |difference| {self.largest_difference:.2e}, largest |logit| {self.largest_logit:.3g}, "
            f"in {name_of(self.precision)}; tolerance {self.tolerance:g} of the largest |logit|"
        )


def prove(folder: Path, checkpoint: Path, exported: torch.dtype) -> Proof:
    """Load `folder` with stock transformers in the trainer's precision and compare on the checkpoint's probe.

    Raises NotEqualError if the logits differ by more than rounding.
    """
    input_ids, trained = load_probe(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=trained.dtype, local_files_only=True)
    found = probe_logits(model, input_ids).double()
    proof = Proof(
        largest_difference=float((found - trained.double()).abs().max()),
        largest_logit=float(trained.double().abs().max()),
        precision=trained.dtype,
        tolerance=max(TOLERANCE[trained.dtype], TOLERANCE[exported]),
    )
    if not proof.holds:
        raise NotEqualError(
            f"the exported model does not give the trainer's logits: {proof}. Nothing was exported. Either the weights "
            "in the checkpoint are not those that were trained, or the way they are folded or read is wrong."
        )
    return proof


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
