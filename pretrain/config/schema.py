"""The typed run configuration: one YAML file and `--set a.b=c`. Every error names the key, its line and the nearest key.

Sections are frozen pydantic models that refuse unknown keys (`pretrain.values`). The schema is the reference: each
section's docstring gives the meaning of its keys. `docs/configuration.md` shows a whole file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce
from math import ceil
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pretrain.config.data_section import DataSection
from pretrain.config.distributions import AnyInit, NormalInit
from pretrain.config.explain import explain
from pretrain.config.model_section import ModelSection, family_section
from pretrain.config.optim_section import OptimSection
from pretrain.config.yaml_file import RunFile, to_yaml
from pretrain.errors import UserError
from pretrain.methods import REGISTRY, Method, allowed_in, allowed_in_vain, decisions_that_clash
from pretrain.methods.base import INITIAL_DEVIATIONS, INITIAL_DISTRIBUTION
from pretrain.methods.pairs import Allowed
from pretrain.model.families import FAMILIES, NEEDS, families_with, missing
from pretrain.paths import check_name, expanded, local
from pretrain.values import Count, LocalPath, Positive, Values, at, nearest_divisor


class WarmStartSection(Values):
    """Shrink and perturb (Ash and Adams 2020, arXiv 1910.08475): loaded matrices become shrink W + noise N(0, 1).

    Attributes:
        shrink: The factor.
        noise: The standard deviation of what is added.
    """

    shrink: float = Field(1.0, ge=0, le=1)
    noise: float = Field(0.0, ge=0, le=1e4)

    @model_validator(mode="after")
    def _does_something(self) -> WarmStartSection:
        if self.shrink == 1 and self.noise == 0:
            raise ValueError("changes nothing with shrink 1 and noise 0: give one of them, or remove the section")
        return self


class ParallelSection(Values):
    """Ways to cut one model other than ZeRO.

    Attributes:
        tensor: Consecutive ranks that hold one copy of every block matrix together and read the same batch.
        sequence: Ranks, or groups of `tensor` ranks, that read the same batch and hold consecutive slices of its sequences.
    """

    tensor: Count = 1
    sequence: Count = 1


class CheckpointSection(Values):
    """Checkpoints: when to save, what to keep, where to start.

    Attributes:
        interval_steps: Steps between checkpoints.
        keep_last: Newest checkpoints that are kept.
        keep_every_steps: Checkpoints at multiples of it are never deleted.
        resume: `auto` (the newest valid checkpoint of the run folder, else from scratch), `never`, or the path of one
            checkpoint, also of a DeepSpeed universal checkpoint.
        asynchronous: Training continues while a checkpoint is written, from a copy in the host's memory.
    """

    interval_steps: Count = 500
    keep_last: Count = 3
    keep_every_steps: Count | None = None
    resume: LocalPath = "auto"
    asynchronous: bool = False

    @field_validator("resume", mode="before")
    @classmethod
    def _a_rule_or_a_path(cls, given: Any) -> Any:
        if not isinstance(given, str):
            raise PydanticCustomError("string_type", "give auto, never, or the path of a checkpoint")
        return given


class EmaSection(Values):
    """An exponential moving average of the weights, kept beside the optimizer's moments.

    Attributes:
        decay: The share of the old average that stays at each step.
        evaluate: Whether each evaluation also takes the validation loss of the average.
    """

    decay: float = Field(0.9999, gt=0, lt=1)
    evaluate: bool = True


class EvalSection(Values):
    """Validation loss over the first global batches of `data.val`.

    Attributes:
        interval_steps: Steps between evaluations.
        batches: Global batches of one evaluation.
    """

    interval_steps: Count = 500
    batches: Count = 50


class WandbSection(Values):
    """Weights & Biases tracking, with the names of metrics.jsonl.

    Attributes:
        mode: Whether and how the run is tracked. The variable WANDB_MODE overrides it for a tracked run.
        project: The project in wandb.
    """

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = Field("evenkeel", min_length=1)


class LogSection(Values):
    """Intervals of logging.

    Attributes:
        interval_steps: Steps between console lines and `train` rows.
        weights_interval_steps: Steps between `weights` rows.
        activations_interval_steps: Steps between `activations` rows.
        wandb: Tracking.
    """

    interval_steps: Count = 10
    weights_interval_steps: Count = 50
    activations_interval_steps: Count = 500
    wandb: WandbSection = WandbSection()


class GuardSection(Values):
    """The reaction to steps that would harm the run.

    A step whose loss or gradient norm is not finite is always skipped: the batch counts, the weights stay.

    Attributes:
        spikes: What to do if loss or gradient norm lies `sigma` standard deviations above its mean over the last
            `window_steps` steps: `report` it, or also `skip` the step.
        sigma: Standard deviations that make a spike.
        window_steps: Steps of the mean and the standard deviation.
        max_skips: After so many skips in a row the run rolls back to the checkpoint before them and continues with the
            data after them.
        max_rollbacks: Rollbacks before the run ends.
    """

    spikes: Literal["report", "skip"] = "report"
    sigma: Positive = 6.0
    window_steps: int = Field(128, ge=8)
    max_skips: Count = 10
    max_rollbacks: int = Field(3, ge=0)


class ResilienceSection(Values):
    """Faults, and how a run reacts to them.

    Attributes:
        watchdog_s: Seconds. A phase of the run that takes longer ends it, with the stacks of all ranks. Null: never.
        agreement_interval_steps: Steps between comparisons of what the ranks must have in common.
        autopsy_steps: Steps that are kept for the autopsy of a spike.
        guard: Bad steps.
    """

    watchdog_s: float | None = Field(600.0, ge=1, le=1e7)
    agreement_interval_steps: Count = 500
    autopsy_steps: Count = 8
    guard: GuardSection = GuardSection()


if TYPE_CHECKING:  # the base classes, which have every hook: the members of the unions are found at run time
    AnyModelSection: TypeAlias = ModelSection
    AnyMethod: TypeAlias = Method
else:
    AnyModelSection = Annotated[reduce(or_, map(family_section, FAMILIES)), Field(discriminator="family")]
    AnyMethod = Annotated[reduce(or_, REGISTRY.values()), Field(discriminator="name")]


def _run_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.\-]*", name):
        raise ValueError("is no name for a folder: letters, digits, _ . and - make one, and neither . nor - begins it")
    return check_name(name)


RunName = Annotated[str, AfterValidator(_run_name)]


class Config(Values):
    """One run.

    Attributes:
        name: The name of the run. Its folder is `<out>/<name>`.
        out: The folder of the run folder.
        seed: Decides initial weights and the order of samples.
        model: The model's family and sizes.
        tokenizer: A tokenizer folder or a SentencePiece `.model` file.
        data: Corpora and batches.
        steps: The length in optimizer steps. Give this or `tokens`.
        tokens: The length in tokens. Give this or `steps`.
        optim: The optimizer.
        methods: The stability methods, each once.
        allow: Pairs of methods to train together against advice, each with a reason: "one + other: why".
        init: The distribution that matrices are drawn from.
        warm_start: What is done to the weights of `model.init_from` before training. Null: nothing.
        deepspeed: A DeepSpeed JSON file, or its content.
        deterministic: On GPUs too, the same bits for the same input.
        compile: `layers` runs the decoder blocks and the loss through torch.compile, `off` runs them eagerly. Null is
            `layers` on a GPU and `off` on a CPU.
        activation_checkpointing: The part of a block that the backward pass computes again instead of keeping it: `off`,
            `full` (all of it), or `selective` (all but the results of matrix products and attention).
        parallel: Tensor and sequence parallelism.
        checkpoint: Checkpoints.
        eval: Validation.
        ema: The average of the weights, if there shall be one.
        log: Logging.
        resilience: Faults.
    """

    name: RunName
    out: LocalPath = "runs"
    seed: int = Field(0, ge=0, lt=2**48)
    model: AnyModelSection
    tokenizer: LocalPath
    data: DataSection
    steps: Count | None = None
    tokens: float | None = Field(None, ge=1)
    optim: OptimSection
    methods: tuple[AnyMethod, ...] = ()
    allow: tuple[str, ...] = ()
    init: AnyInit = NormalInit()
    warm_start: WarmStartSection | None = None
    deepspeed: LocalPath | dict[str, Any]
    deterministic: bool = False
    compile: Literal["off", "layers"] | None = None
    activation_checkpointing: Literal["off", "full", "selective"] = "off"
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    ema: EmaSection | None = None
    log: LogSection = LogSection()
    resilience: ResilienceSection = ResilienceSection()

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _a_file_or_its_content(cls, given: Any) -> Any:
        if not isinstance(given, str | dict):
            raise ValueError("give the path of a DeepSpeed JSON file, or its content as a mapping")
        return expanded(given) if isinstance(given, str) else given

    @field_validator("init", mode="before")
    @classmethod
    def _normal_unless_it_says_otherwise(cls, given: Any) -> Any:
        only_deviations = isinstance(given, dict) and given.keys() == {"std"}
        return {"distribution": "normal", **given} if only_deviations else given

    @field_validator("allow")
    @classmethod
    def _pairs_with_reasons(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        allowed_in(given)
        return given

    @field_validator("compile", "activation_checkpointing", mode="before")
    @classmethod
    def _off_as_yaml_reads_it(cls, given: Any) -> Any:
        return "off" if given is False else given

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _true_of_older_files(cls, given: Any) -> Any:
        return "full" if given is True else given

    @model_validator(mode="after")
    def _one_length(self) -> Config:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                "give the length of the run once: either 'steps' or 'tokens' (to override one that the file sets: "
                "--set tokens=null --set steps=100)"
            )
        if self.total_steps * self.tokens_per_step > 2**63 - 1:
            raise at("steps" if self.steps else "tokens", "more tokens in all than a 64-bit integer can count")
        return self

    @model_validator(mode="after")
    def _equal_slices_of_sequences(self) -> Config:
        length, slices = self.data.seq_len, self.parallel.sequence
        if length % slices:
            raise at(
                "parallel.sequence",
                f"{slices} does not divide data.seq_len {length}, and ranks hold equal slices of a sequence: the nearest "
                f"that does is {nearest_divisor(length, slices)}",
            )
        return self

    @model_validator(mode="after")
    def _weights_that_are_drawn_or_loaded(self) -> Config:
        if self.model.init_from is None:
            if self.warm_start is not None:
                raise at("warm_start", "needs model.init_from: weights that are drawn are not shrunk and perturbed")
            return self
        if self.init != NormalInit():
            raise at("init", "has no effect, because model.init_from gives the initial values: remove one of the two")
        for method in self.methods:
            if method.only_initializes():
                raise ValueError(
                    f"method {method.name} decides initial values and does nothing else, and model.init_from gives them: "
                    "remove the method, or model.init_from"
                )
        return self

    @model_validator(mode="after")
    def _each_method_once(self) -> Config:
        names = [method.name for method in self.methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"methods lists {', '.join(sorted(twice))} more than once")
        return self

    @model_validator(mode="after")
    def _methods_that_go_together(self) -> Config:
        for method in self.methods:
            if lacks := missing(self.model.family, method.needs):
                raise ValueError(
                    f"method {method.name} cannot act on a {self.model.family}: it needs "
                    f"{' and '.join(NEEDS[need] for need in lacks)}. Families that have what it needs: "
                    f"{', '.join(families_with(method.needs))}"
                )
            if self.parallel.tensor > 1 and not method.tensor_parallel:
                raise ValueError(
                    f"method {method.name} cannot be used with parallel.tensor {self.parallel.tensor}, where no rank has "
                    "whole matrices or all heads: set it to 1 and let ZeRO share out the weights"
                )
            if INITIAL_DEVIATIONS in method.decides and self.init.deviations:
                raise ValueError(
                    f"method {method.name} decides the initial deviations, and so does 'init.std': keep one of them"
                )
            if INITIAL_DISTRIBUTION in method.decides and self.init != NormalInit():
                raise ValueError(
                    f"method {method.name} draws from a distribution of its own, and so does 'init': keep one of them"
                )
        if clashes := decisions_that_clash(self.methods, self.allowed):
            raise ValueError("; ".join(clashes))
        if in_vain := allowed_in_vain(self.methods, self.allowed):
            raise at("allow", "; ".join(in_vain))
        return self

    @property
    def allowed(self) -> list[Allowed]:
        """The pairs of methods that this run takes against advice."""
        return allowed_in(self.allow)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) / self.name

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens that one optimizer step trains on, after the ramp if there is one."""
        return self.data.largest_batch * self.data.seq_len

    def tokens_after(self, step: int) -> int:
        """Return the number of tokens that `step` steps train on."""
        return self.data.batch_sizes.after(0, step) * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None  # one of the two is given
        return self.data.batch_sizes.steps_between(0, ceil(self.tokens / self.data.seq_len))

    def to_yaml(self) -> str:
        """Return the resolved configuration. This text alone reproduces the run."""
        return to_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run file.

    Args:
        path: the file. A string is expanded like the paths in a run file.
        overrides: the values of `--set`: "a.b=c" with c in YAML.

    Raises:
        UserError: with every mistake on a line: its file and line, the full key and the nearest valid key.
    """
    try:
        file = RunFile(Path(local(path)) if isinstance(path, str) else path)
    except ValueError as error:
        raise UserError(f"the run file '{path}': {error}.") from error
    for override in overrides:
        file.override(override)
    try:
        return Config.model_validate(file.data)
    except ValidationError as error:
        lines = [explain(mistake, Config, file) for mistake in error.errors()]
        raise UserError("the configuration is wrong:\n  " + "\n  ".join(lines)) from None
