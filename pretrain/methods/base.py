"""The contract of a stability method, and the parts that all methods share.

A method is one file in this folder: its formula and source at the top, its options as typed fields, and the two or
three hooks that it needs. A run lists its methods in YAML. Hooks of several methods are called in the order of that list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import PrivateAttr

from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.values import Values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from pretrain.model.export_edits import LazyTensors
    from pretrain.model.hidden_terms import HiddenTerm
    from pretrain.model.loss import LossTerm
    from pretrain.sharded import ShardedWeights
    from pretrain.sharded.draws import Draw


# Decisions that only one method of a run may make: two methods that decide the same thing contradict each other.
INITIAL_DEVIATIONS = "the initial deviations"
INITIAL_DISTRIBUTION = "the distribution of initial values"  # the run's `init` section decides it too
FORM_OF_MATRICES = "how forward makes its matrices from the stored ones"
NORMALIZATION = "the kind of normalization"
EMBEDDING = "what happens to the embedding before the first block"
RESIDUAL_STREAM = "how sub-layers read the residual stream"


@dataclass(frozen=True)
class RunContext:
    """The values of the run that a method may depend on besides its own options.

    Attributes:
        family: the name of the model's family.
        model_config: the model's Hugging Face configuration, as the methods' `configure` made it.
        hidden_size: d.
        layers: the number of decoder blocks, N.
        tied: whether the head's matrix is the embedding's.
        matrices: the matrices of the model before methods transform it, by the name of their module. The head is among
            them also where it is tied.
        tokens_per_step: tokens of one optimizer step, over all ranks.
        total_steps: optimizer steps of the run.
        optimizer: the name of the run's optimizer, `optim.name`.
        learning_rate: maps an optimizer step, counted from 1, to the learning rate.
        peak_lr: maps a weight to the highest learning rate of the optimizer that steps it.
        initial_std: maps a weight to the standard deviation that it is drawn with.
        forward_factor: maps a weight to the factor that forward multiplies the stored matrix by: a number, or the name
            of the trained weight that holds it.
        weight_decay: maps a weight to AdamW's weight decay.
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
        """The name of the input embedding's module."""
        return next(module for module, weight in self.matrices.items() if weight.role == "embed")

    @property
    def head(self) -> str:
        """The name of the stored matrix that logits are made with: the embedding's where they are tied."""
        return f"{self.embedding if self.tied else 'lm_head'}.weight"


class Method(Values):
    """One stability method. Override only the hooks that it needs. Every hook has a neutral default.

    Subclasses set `name: Literal["..."]` and declare their options as fields. Fields are frozen. What a method does at
    step s is a function of its options, the run, s and the weights, so a resumed run does the same.

    Class attributes:

    - `conflicts`: names of methods that it cannot be combined with, besides those that decide the same (see `decides`),
      each with a sentence that says why: one would have no effect, or no export could hold the two.
    - `discouraged`: names of methods with which it is well defined but against what is known, each with a sentence that
      says so. A run can `allow` such a pair.
    - `needs`: what a model family must have for it (`pretrain.model.families.NEEDS`). Families without that are refused.
    - `tensor_parallel`: whether it may be used where AutoTP cuts the matrices.
    - `eager_blocks`: why torch.compile cannot take the blocks of a model with this method, None where it can. They then
      run eagerly, and the plan that is printed at start says so.
    - `fold_order`: folds run from the lowest number to the highest. A fold of order 0 gets the matrices as they are
      stored. One of order 1 gets them as forward multiplies by them, and may move the embedding's factor into a Granite.
      One of order 2 gets an embedding that is what enters the residual stream. One of order 3 gets the class and the
      weights that all the others have made.
    """

    conflicts: ClassVar[Mapping[str, str]] = {}
    discouraged: ClassVar[Mapping[str, str]] = {}
    needs: ClassVar[frozenset[Need]] = frozenset()
    tensor_parallel: ClassVar[bool] = True
    eager_blocks: ClassVar[str | None] = None
    fold_order: ClassVar[int] = 1

    name: str
    _run: RunContext | None = PrivateAttr(None)

    @property
    def decides(self) -> frozenset[str]:
        """The decisions that no other method of the run may make. A subclass may have a class attribute instead."""
        return frozenset()

    @property
    def run(self) -> RunContext:
        """The run that the method is part of. It is there from `transform` on.

        Raises:
            RuntimeError: for a method that is not bound to a run.
        """
        if self._run is None:
            raise RuntimeError(f"{self.name} needs a value of its run, and was not bound to one")
        return self._run

    def bound(self, run: RunContext) -> Self:
        """Return a copy of this method that is part of `run`."""
        copy = self.model_copy()
        copy._run = run
        return copy

    @classmethod
    def acts_in_forward(cls) -> bool:
        """Return whether it changes what the model computes with its weights."""
        return cls._overrides("configure", "transform", "fold")

    @classmethod
    def only_initializes(cls) -> bool:
        """Return whether it does nothing but to decide initial values."""
        of_loss, of_training = ("loss_terms", "hidden_terms"), ("prepare", "after_step", "decays", "weight_decay")
        acts = cls.acts_in_forward() or cls._overrides(*of_loss, *of_training)
        return cls._overrides("init_std", "init_draw") and not acts

    @classmethod
    def leaves_weights_plain(cls) -> bool:
        """Return whether a stock class computes with the stored weights what the trained model does."""
        return not cls._overrides("configure", "fold")

    @classmethod
    def _overrides(cls, *hooks: str) -> bool:
        return any(getattr(cls, hook) is not getattr(Method, hook) for hook in hooks)

    # before the model is built

    def configure(self, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        """Change the configuration that the model is built from. Local.

        Args:
            hf_config: the configuration, as earlier methods left it.

        Returns:
            The same object, changed or not, or a configuration of another class: its class selects the model's class.
        """
        return hf_config

    def transform(self, model: PreTrainedModel) -> None:
        """Replace or wrap modules of the freshly built model, before the engine shards it. Local.

        Runs under ZeRO-3's `zero.Init`, so a new parameter must be made in the `__init__` of its own module.

        Args:
            model: the model, with undefined values. Its head, `lm_head`, is a `pretrain.model.loss.LossHead`.
        """

    def loss_terms(self) -> Mapping[str, LossTerm]:
        """Return the terms to add to the cross-entropy, by the names under which they are reported. Local."""
        return {}

    def hidden_terms(self) -> Mapping[str, HiddenTerm]:
        """Return terms on the residual stream after each block to add to the cross-entropy, by their reported names. Local."""
        return {}

    def check(self, weights: list[Weight]) -> None:
        """Refuse options that do not fit the model. Local.

        A method without an `init_rule` or a `training_rule` for any weight is refused without being asked.

        Args:
            weights: every weight of the transformed model.

        Raises:
            UserError: if the options do not fit.
        """

    def forward_factor(self, weight: Weight) -> float | str | None:
        """Return the factor that forward multiplies a stored matrix by, where it does no more than that. Local.

        Returns:
            A number, or the name of the trained weight of one element that holds it. None where the method does not
            change the matrix.
        """

    def forward_identity(self) -> str:
        """Return a text that is the same for two runs exactly if the method does the same in forward. Local.

        A run resumes only from a checkpoint with the same text. By default it holds the options. Override it where
        another value of the run has an effect on forward.
        """
        return f"{self.name} {self.model_dump_json(exclude_defaults=True)}"

    # initial values

    def init_std(self, weight: Weight) -> float | None:
        """Return the initial standard deviation of a matrix, whose distribution is the run's. Local.

        None leaves it to other methods. Of several methods that return one, the last decides.
        """

    def init_draw(self, weight: Weight) -> Draw | None:
        """Return the whole initial distribution of a weight, matrix or not. Local.

        None leaves it to `init_std` and to other methods. Of several methods that return one, the first decides.
        """

    # weights of another model

    def why_not_from_weights(self) -> str | None:
        """Return why a run with this method cannot start from a plain model's weights, None if it can. Local.

        By default a method that acts in forward cannot, unless it overrides `take_over`.
        """
        if not self.acts_in_forward() or self._overrides("take_over"):
            return None
        return (
            f"{self.name} changes what the model computes, so the loaded weights would serve another function. Start from "
            f"a checkpoint of a run with the same methods, or train without {self.name}"
        )

    def take_over(self, weights: ShardedWeights) -> None:
        """Change the weights, which are a plain model's, so that forward computes what that model does. Collective.

        The method's own weights have their initial values. Called before `prepare`, in the reverse order of the folds.

        Args:
            weights: the engine's weights. Both of their copies are up to date.

        Raises:
            UserError: on every rank, for weights with which it cannot.
        """

    # training

    def decays(self, weight: Weight) -> bool | None:
        """Return whether a weight decays at all. Local.

        None leaves it as it is: matrices decay, the rest does not. Of several methods that answer, the last decides.
        """

    def weight_decay(self, weight: Weight) -> float | None:
        """Return the weight decay, as the optimizer's option, of a weight that decays. Local.

        None leaves it at the run's. Of several methods that return one, the last decides.
        """

    def prepare(self, weights: ShardedWeights) -> None:
        """Prepare for training, when the engine holds its values, initial or loaded. Called once. Collective.

        Raises:
            UserError: if the method cannot act on the engine.
        """

    def follow(self, weights: ShardedWeights) -> None:
        """Forget what forward has computed from weights that others have taken the place of. Collective.

        Called where an average stands in for the weights in evaluation, and when they are back.

        Args:
            weights: the engine's weights. Both of their copies are up to date.
        """

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        """Act on the weights after an optimizer step. Called on every rank after every step. Collective.

        Args:
            step: the number of the step, counted from 1 over the whole run.
            weights: the engine's weights. Both of their copies are up to date.

        Returns:
            Measurements by name (std, mean, rescaled, ...) for each weight by its name. They go into the `weights` rows
            of metrics.jsonl.
        """
        return {}

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint must hold besides the weights, by name: the same on every rank. Local."""
        return {}

    def load_state(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors that `state` returned. Local.

        Args:
            model: the model that the engine trains.
            state: the tensors of all methods of the run.
        """

    # export

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        """Rewrite the exported weights in place, so that a stock Hugging Face class computes the same logits. Local.

        Args:
            tensors: the weights as forward used them, float32, and the tensors of `state`. Remove each entry that a
                stock class lacks.
            hf_config: the configuration that the weights belong to.

        Returns:
            The configuration of the rewritten weights.
        """
        return hf_config

    def fold_note(self) -> str | None:
        """Return what `fold` does, or why no stock class can hold the model, as a sentence. None if weights are plain."""

    # for the table that is printed at start

    def init_rule(self, weight: Weight) -> str | None:
        """Return the rule in words by which `init_std` or `init_draw` chose for this weight."""

    def training_rule(self, weight: Weight) -> str | None:
        """Return what the method does with this weight in training, in words: in forward, in the loss, after a step."""
