"""The typed run configuration: one YAML file plus `--set a.b=c`; every error names the key, its line and the nearest key.

Sections are frozen pydantic models that refuse unknown keys (`pretrain.values`). The schema is the reference: each
section's docstring says what its keys mean. `docs/configuration.md` shows a whole file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import reduce
from math import ceil
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pretrain.config.distributions import AnyInit, NormalInit
from pretrain.config.explain import explain
from pretrain.config.model_section import family_section
from pretrain.config.yaml_file import RunFile, to_yaml
from pretrain.credentials import credential_in
from pretrain.errors import UserError
from pretrain.methods import REGISTRY, decisions_that_clash
from pretrain.methods.base import INITIAL_DISTRIBUTION
from pretrain.paths import check_name, expanded, local
from pretrain.values import Count, LocalPath, Location, Positive, Share, Values, at

FAMILIES = ("llama", "gpt2")


Rate = Annotated[float, Field(gt=0, le=100)]


class SourceSection(Values):
    """One corpus of a mixture: its shards, and its share of the samples as a weight relative to the others'."""

    path: Location
    weight: Positive = 1.0


class ShuffleSection(Values):
    """How far samples are shuffled in each epoch.

    scope: `global` over the whole corpus, or `windowed`: shards in a shuffled order, and samples among `window_shards`
    of them at a time, so that no more than two windows of a remote corpus need to be here.
    """

    scope: Literal["global", "windowed"] = "global"
    window_shards: Count = 8

    @model_validator(mode="after")
    def _windows_where_there_are_any(self) -> ShuffleSection:
        if self.scope == "global" and self.window_shards != 8:
            raise ValueError("window_shards has no effect here: set 'scope: windowed', or remove it")
        return self


class CacheSection(Values):
    """Where shards of remote corpora are kept on each node, shared by its ranks and by other runs.

    limit_gb: 10^9 bytes that the folder never exceeds. downloads: files of a corpus that are fetched ahead at a time.
    """

    folder: str = "~/.cache/evenkeel"
    limit_gb: Positive = 100.0
    downloads: int = Field(4, gt=0, le=256)

    @property
    def path(self) -> Path:
        """The folder as this node has it: `folder` stays as it was written. UserError where it cannot be filled in."""
        try:
            return Path(local(os.path.expanduser(self.folder)))  # may be in a home that lasts as long as this process
        except ValueError as error:
            raise UserError(f"data.cache.folder '{self.folder}': {error}.") from error


class DataSection(Values):
    """Where the tokens come from and how they form batches.

    train: a shard folder or URL, or a list of {path, weight}. val: a shard folder or URL (null: no evaluation). seq_len:
    tokens per sequence. global_batch_size: sequences per optimizer step. micro_batch_size: sequences per data-parallel rank
    and forward pass. packing: `concatenate` documents and cut every seq_len tokens, or whole documents by `best_fit`.
    document_attention: attention and positions end with each document. verify: `full` compares every shard's checksum
    at start, `size` only its length.
    """

    train: tuple[SourceSection, ...]
    val: Location | None = None
    seq_len: Count
    global_batch_size: Count
    micro_batch_size: Count
    shuffle: ShuffleSection = ShuffleSection()
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    document_attention: bool = False
    verify: Literal["full", "size"] = "full"
    cache: CacheSection = CacheSection()

    @field_validator("train", "val", mode="before")
    @classmethod
    def _without_credentials(cls, given: Any) -> Any:
        if fault := credential_in(str(given)):
            raise ValueError(fault)
        return given

    @field_validator("train", mode="before")
    @classmethod
    def _one_folder_is_a_mixture_of_one(cls, given: Any) -> Any:
        if isinstance(given, str):
            return ({"path": expanded(given)},)
        if not isinstance(given, list | tuple) or not given:
            raise ValueError("give a shard folder, or a list of mappings of the keys path, weight")
        return given

    @field_validator("train")
    @classmethod
    def _each_source_once(cls, sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        names: dict[str, list[str]] = {}
        for source in sources:
            path = source.path.removeprefix("file://")
            names.setdefault(path.rstrip("/") if "://" in path else os.path.realpath(path), []).append(source.path)
        if twice := [f"{first} more than once (as {', '.join(others)})" for first, *others in names.values() if others]:
            raise ValueError(f"lists {', '.join(twice)}: give it one entry with the sum of the weights")
        return sources

    @field_serializer("train")
    def _one_folder_as_it_was_given(self, sources: tuple[SourceSection, ...]) -> Any:
        return sources[0].path if len(sources) == 1 else [source.model_dump() for source in sources]


class ScheduleSection(Values):
    """The learning rate over the run: see `pretrain.optim.param_groups.learning_rate`."""

    name: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    decay_ratio: float = Field(0.2, gt=0, le=1)


class MuonSection(Values):
    """Muon, which steps the matrices of the blocks where `optim.name` is muon; AdamW steps the rest.

    lr, weight_decay: null takes those of `optim`. momentum: of the average of gradients. scale: `adam_rms` makes an
    update about as large as AdamW's, so that one learning rate fits both; `spectral` gives it singular values near 1,
    times sqrt(rows / columns) in tall matrices. ns_method: which Newton-Schulz iteration orthogonalizes.
    """

    lr: Rate | None = None
    momentum: Share = 0.95
    weight_decay: float | None = Field(None, ge=0)
    scale: Literal["adam_rms", "spectral"] = "adam_rms"
    ns_method: Literal["gram", "standard"] = "gram"


class ZClipSection(Values):
    """Clipping that adapts to the run (ZClip, Kumar et al. 2025, arXiv 2504.02507, algorithm 1).

    z_threshold: standard deviations above the mean gradient norm from which it is clipped. alpha: decay of the running
    mean and variance. warmup_steps: steps that they are first taken from, unclipped.
    """

    z_threshold: Positive = 2.5
    alpha: float = Field(0.97, gt=0, lt=1)
    warmup_steps: int = Field(25, ge=2)


class OptimSection(Values):
    """The optimizer. lr and weight_decay are AdamW's; weight_decay acts on matrices only; grad_clip null turns clipping
    off. muon only goes with that `name`, and with grad_clip null. zclip clips by the run's own norms, after grad_clip.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: Positive | None = 1.0
    zclip: ZClipSection | None = None
    muon: MuonSection = MuonSection()
    schedule: ScheduleSection = ScheduleSection()

    @model_validator(mode="after")
    def _decay_that_shrinks(self) -> OptimSection:
        muon_lr, muon_decay = self.muon.lr or self.lr, self.muon.weight_decay
        for key, lr, decay in (
            ("weight_decay", self.lr, self.weight_decay),
            ("muon.weight_decay", muon_lr, self.weight_decay if muon_decay is None else muon_decay),
        ):
            if lr * decay >= 1:
                raise at(
                    key,
                    f"{decay:g} times the learning rate {lr:g} must be below 1: a step takes that share of a weight",
                )
        return self

    @model_validator(mode="after")
    def _muon_as_it_works(self) -> OptimSection:
        if self.name != "muon" and self.muon != MuonSection():
            raise ValueError("the keys of 'muon' have no effect here: set 'name: muon', or remove them")
        if self.name == "muon" and self.grad_clip is not None:
            raise ValueError(
                "with 'name: muon' grad_clip must be null: DeepSpeed clips after Muon has made its updates, by their "
                "norm, which is the larger the more matrices the model has, so every step would be far too short"
            )
        if self.name == "muon" and self.zclip is not None:
            raise ValueError(
                "with 'name: muon' zclip must be null: an update of Muon's does not grow with the gradient"
            )
        return self


class ParallelSection(Values):
    """Ways to cut one model other than ZeRO.

    tensor: consecutive ranks that hold one copy of every block matrix between them and read the same batch. sequence:
    only 1 is supported so far.
    """

    tensor: Count = 1
    sequence: int = Field(1, ge=1, le=1)


class CheckpointSection(Values):
    """When to save, what to keep, where to start.

    keep_last: newest checkpoints kept. keep_every_steps: multiples of it are kept for ever. resume: `auto` (the
    newest valid checkpoint of the run folder, else from scratch), `never`, or the path of one checkpoint. asynchronous:
    training goes on while a checkpoint is written, from a copy in the host's memory.
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


class EvalSection(Values):
    """Validation loss every `interval_steps` over the first `batches` global batches of data.val."""

    interval_steps: Count = 500
    batches: Count = 50


class WandbSection(Values):
    """Weights & Biases tracking, with the names of metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = Field("evenkeel", min_length=1)


class LogSection(Values):
    """How often to write console lines and `train` rows, `weights` rows and `activations` rows."""

    interval_steps: Count = 10
    weights_interval_steps: Count = 50
    activations_interval_steps: Count = 500
    wandb: WandbSection = WandbSection()


class GuardSection(Values):
    """What happens to steps that would harm the run.

    A step whose loss or gradient norm is not finite is always skipped: the batch counts, the weights stay. spikes: what to
    do where either lies `sigma` standard deviations above its mean over the last `window_steps` steps: `report` it, or
    `skip` the step too. max_skips: after so many skips in a row the run rolls back to the checkpoint before them and goes
    on with the data after them; max_rollbacks: how often, before it ends.
    """

    spikes: Literal["report", "skip"] = "report"
    sigma: Positive = 6.0
    window_steps: int = Field(128, ge=8)
    max_skips: Count = 10
    max_rollbacks: int = Field(3, ge=0)


class ResilienceSection(Values):
    """Faults and bad days.

    watchdog_s: a phase of the run that takes longer ends it, with the stacks of all ranks; null never does.
    agreement_interval_steps: how often the ranks compare what they must have in common. autopsy_steps: steps that are
    remembered for the autopsy of a spike.
    """

    watchdog_s: float | None = Field(600.0, ge=1, le=1e7)
    agreement_interval_steps: Count = 500
    autopsy_steps: Count = 8
    guard: GuardSection = GuardSection()


AnyModelSection = Annotated[reduce(or_, map(family_section, FAMILIES)), Field(discriminator="family")]
AnyMethod = Annotated[reduce(or_, REGISTRY.values()), Field(discriminator="name")]


def _run_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.\-]*", name):
        raise ValueError("is no name for a folder: letters, digits, _ . and - make one, and neither . nor - begins it")
    return check_name(name)


RunName = Annotated[str, AfterValidator(_run_name)]


class Config(Values):
    """One run.

    name, out: the run folder is <out>/<name>. steps or tokens: the length, exactly one of them. methods: each once.
    init: the distribution that matrices are drawn from. deepspeed: a DeepSpeed JSON file or its content.
    activation_checkpointing: recompute blocks in backward.
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
    init: AnyInit = NormalInit()
    deepspeed: LocalPath | dict[str, Any]
    activation_checkpointing: bool = False
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    resilience: ResilienceSection = ResilienceSection()

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _a_file_or_its_content(cls, given: Any) -> Any:
        if not isinstance(given, str | dict):
            raise ValueError("give the path of a DeepSpeed JSON file, or its content as a mapping")
        return expanded(given) if isinstance(given, str) else given

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
    def _each_method_once(self) -> Config:
        names = [method.name for method in self.methods]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"methods lists {', '.join(sorted(twice))} more than once")
        return self

    @model_validator(mode="after")
    def _methods_that_go_together(self) -> Config:
        for method in self.methods:
            if self.model.family not in method.families:
                raise ValueError(
                    f"method {method.name} cannot act on a {self.model.family}, only on: {', '.join(method.families)}"
                )
            if self.parallel.tensor > 1 and not method.tensor_parallel:
                raise ValueError(
                    f"method {method.name} cannot be used with parallel.tensor {self.parallel.tensor}, where no rank has "
                    "whole matrices or all heads: set it to 1 and let ZeRO share out the weights"
                )
            if INITIAL_DISTRIBUTION in method.decides and self.init != NormalInit():
                raise ValueError(
                    f"method {method.name} draws from a distribution of its own, and so does 'init': keep one of them"
                )
        if clashes := decisions_that_clash(self.methods):
            raise ValueError("; ".join(clashes))
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) / self.name

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on."""
        return self.data.global_batch_size * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or ceil(self.tokens / self.tokens_per_step)

    def to_yaml(self) -> str:
        """The resolved configuration: this text alone reproduces the run."""
        return to_yaml(self.model_dump(mode="json"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the run file at `path` and apply `--set` overrides ("a.b=c", the value in YAML).

    path: a text is read as the paths in a run file are. Raises UserError that lists every mistake with its file and
    line, the full key and the nearest valid key.
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
