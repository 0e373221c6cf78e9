"""The contract of a stability method, and the parts that all methods share.

A method is one file in this folder: its formula and source at the top, its options as typed fields, and the two or
three hooks that it needs. A run lists its methods in YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PrivateAttr

from pretrain.model.layout import Weight
from pretrain.values import Values

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedConfig

    from pretrain.model.export_edits import LazyTensors
    from pretrain.model.loss import LossTerm
    from pretrain.sharded import ShardedWeights
    from pretrain.sharded.draws import Draw


# What a run's methods may decide only once: two that decide the same thing contradict each other.
INITIAL_DEVIATIONS = "the initial deviations"
INITIAL_DISTRIBUTION = "the distribution of initial values"  # also the run's `init` section does
FORM_OF_MATRICES = "how forward makes its matrices from the stored ones"
NORMALIZATION = "the kind of normalization"
EMBEDDING = "what happens to the embedding before the first block"
RESIDUAL_STREAM = "how sub-layers read the residual stream"


@dataclass(frozen=True)
class RunContext:
    """What a method may know of the run besides its own options.

    model_config: what `configure` made of it. layers: decoder blocks, N. tied: whether the head's matrix is the
    embedding's. matrices: of the model before methods transform it, by the name of their module, the head also where it is
    tied. optimizer: `adamw` or `muon`. learning_rate: of an optimizer step, counted from 1. peak_lr: of the optimizer that
    steps a weight. initial_std: the deviation that a weight is drawn with. forward_factor: what forward multiplies a stored
    matrix by, a number or the name of the trained weight that holds it. weight_decay: AdamW's, of one weight.
    """

    family: str
    model_config: PreTrainedConfig
    hidden_size: int
    layers: int
    tied: bool
    matrices: Mapping[str, Weight]
    tokens_per_step: int
    total_steps: int
    optimizer: str
    learning_rate: Callable[[int], float]
    peak_lr: Callable[[Weight], float]
    initial_std: Callable[[Weight], float]
    forward_factor: Callable[[Weight], float | str]
    weight_decay: Callable[[Weight], float]

    @property
    def embedding(self) -> str:
        """The module of the input embedding."""
        return next(module for module, weight in self.matrices.items() if weight.role == "embed")

    @property
    def head(self) -> str:
        """The name of the stored matrix that logits are made with: the embedding's where they are tied."""
        return f"{self.embedding if self.tied else 'lm_head'}.weight"


class Method(Values):
    """One stability method. Override only what it needs; every hook has a neutral default.

    Subclasses set `name: Literal["..."]` and declare their options as fields. Fields are frozen: whatever a method
    decides at step s is a function of the options, the run, s and the weights, so a resumed run decides the same.

    decides: what no other method of the run may decide; a property where that depends on the options. conflicts: names
    of further methods that it cannot be combined with, and why: a sentence. families: the model families that it can act
    on. tensor_parallel: whether it may be used where AutoTP cuts the matrices. fold_order: folds are done from the lowest
    number to the highest. One with 0 sees the stored matrices, one with 1 matrices as forward multiplies by them (and may
    already put the embedding's factor into a Granite), one with 2 an embedding that is what enters the residual stream,
    and one with 3 the class and the weights that all the others have made.
    """

    decides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[Mapping[str, str]] = {}
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    tensor_parallel: ClassVar[bool] = True
    fold_order: ClassVar[int] = 1

    name: str
    _run: RunContext = PrivateAttr(None)

    @property
    def run(self) -> RunContext:
        """The run that the method is part of; there from `check` on."""
        if self._run is None:
            raise RuntimeError(f"{self.name} was asked for what only a run can tell before it was bound to one")
        return self._run

    def bound(self, run: RunContext) -> Self:
        """This method as part of `run`."""
        copy = self.model_copy()
        copy._run = run
        return copy

    # before the model is built

    def configure(self, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        """The model's Hugging Face configuration, changed or exchanged for another class's; see `model_class`."""
        return hf_config

    def transform(self, model: torch.nn.Module) -> None:
        """Replace or wrap modules of the freshly built model, before the engine shards it.

        Runs under ZeRO-3's `zero.Init`: a new parameter must be made in the `__init__` of its own module.
        """

    def loss_terms(self) -> Mapping[str, LossTerm]:
        """Terms added to the cross-entropy, by the names under which they are reported."""
        return {}

    def check(self, weights: list[Weight]) -> None:
        """Raise UserError if the options do not fit the model. A method without a rule for any weight is refused anyway."""

    def forward_factor(self, weight: Weight) -> float | str | None:
        """What forward multiplies this stored matrix by, where it does no more: a number, or the name of the trained
        weight of one element that holds it; None where the method does not touch it.
        """

    def forward_identity(self) -> str:
        """Return what distinguishes this method's forward from another's; a run resumes only from a checkpoint with the same.

        Its options, unless something else of the run shows in forward.
        """
        return f"{self.name} {self.model_dump_json(exclude_defaults=True)}"

    # initial values

    def init_std(self, weight: Weight) -> float | None:
        """The initial standard deviation of one matrix, which has the run's distribution; None leaves it to others."""

    def init_draw(self, weight: Weight) -> Draw | None:
        """The very distribution of one weight, matrix or not, where `init_std` does not say enough; None leaves it."""

    # training

    def decays(self, weight: Weight) -> bool | None:
        """Whether one weight decays at all; None leaves it: matrices do, the rest does not."""

    def weight_decay(self, weight: Weight) -> float | None:
        """The weight decay, in the optimizer's sense, of one weight that decays; None leaves it at the run's."""

    def prepare(self, weights: ShardedWeights) -> None:
        """Called once the engine holds its values, initial or loaded, before the first step. Collective.

        Raise UserError if the engine is none that can be acted on.
        """

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        """Act on the weights once optimizer step `step` (counted from 1) is done. Collective.

        Returns facts by weight name (std, mean, rescaled, ...) for the `weights` rows of metrics.jsonl.
        """
        return {}

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the weights, by name; the same on every rank."""
        return {}

    def load_state(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state` gave. `state` holds that of all methods of the run."""

    # export

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        """Rewrite the exported weights so that a stock Hugging Face class gives the same logits; returns its configuration.

        tensors: the weights as forward saw them, and what `state` stored. Each entry that a stock class lacks must go.
        """
        return hf_config

    def fold_note(self) -> str | None:
        """What `fold` does, or why no stock class can hold the model, in a sentence for people; None: weights are plain."""

    # for the table that is printed at start

    def init_rule(self, weight: Weight) -> str | None:
        """How `init_std` or `init_draw` got its number for this weight."""

    def training_rule(self, weight: Weight) -> str | None:
        """What the method does to this weight or with it in training: in forward, in the loss, after a step."""


def decisions_that_clash(methods: tuple[Method, ...]) -> list[str]:
    """A sentence for each pair of methods that cannot be combined."""
    clashes = []
    for position, second in enumerate(methods):
        for first in methods[:position]:
            reason = first.conflicts.get(second.name) or second.conflicts.get(first.name)
            if reason is None and (both := first.decides & second.decides):
                reason = f"both decide {', '.join(sorted(both))}: keep one of them"
            if reason:
                clashes.append(f"methods {first.name} and {second.name} cannot be combined: {reason}")
    return clashes
