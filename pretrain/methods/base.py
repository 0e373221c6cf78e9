"""The contract of a stability method, and the parts that all methods share.

A method is one file in this folder: its formula and source at the top, its options as typed fields, and the two or
three hooks that it needs. A run lists its methods in YAML; they act in that order.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from pretrain.layout import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pretrain.sharded import ShardedWeights

# Exported weights by name, each a function that loads it, so that only the tensor at hand is in memory.
LazyTensors = MutableMapping[str, Callable[[], torch.Tensor]]


class Method(BaseModel):
    """One stability method. Override only what it needs; every hook has a neutral default.

    Subclasses set `name: Literal["..."]` and declare their options as fields. Fields are frozen: whatever a method
    decides at step s is a function of the options, s and the weights, so a resumed run decides the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str

    def configure(self, hf_config: PreTrainedConfig) -> None:
        """Change the model's Hugging Face configuration before the model is built."""

    def transform(self, model: torch.nn.Module) -> None:
        """Replace or wrap modules of the freshly built model, before the engine shards it."""

    def check(self, weights: list[Weight]) -> None:
        """Raise UserError if the options do not fit the model (a method that matches nothing, say)."""

    def init_std(self, weight: Weight) -> float | None:
        """The initial standard deviation of one matrix; None leaves it to the methods before."""

    def prepare(self, weights: ShardedWeights) -> None:
        """Called once the engine exists, before the first step. Raise UserError if it is none that can be acted on."""

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        """Act on the weights once optimizer step `step` (counted from 1) is done. Collective.

        Returns facts by weight name (std, mean, rescaled, ...) for the `weights` rows of metrics.jsonl.
        """
        return {}

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> None:
        """Rewrite the exported weights and configuration so that a stock Hugging Face class gives the same logits."""

    def init_rule(self, weight: Weight) -> str | None:
        """How `init_std` got its number for this weight, for the table that is printed at start."""

    def step_rule(self, weight: Weight) -> str | None:
        """What `after_step` does to this weight, for the table that is printed at start."""
