"""The `data` section: where the tokens lie, and how they become batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, field_serializer, field_validator, model_validator

from pretrain.credentials import credential_in
from pretrain.data.batches.batch_sizes import BatchSizes
from pretrain.errors import UserError
from pretrain.paths import expanded, local
from pretrain.values import Count, Location, Positive, Values, at


class SourceSection(Values):
    """One corpus of a mixture.

    Attributes:
        path: A shard folder or URL.
        weight: The corpus's share of the samples, relative to the other weights.
    """

    path: Location
    weight: Positive = 1.0


class ShuffleSection(Values):
    """The shuffling of samples in each epoch.

    Attributes:
        scope: `global` shuffles over the whole corpus. `windowed` takes shards in a shuffled order and shuffles samples
            among `window_shards` of them at a time, so at most two windows of a remote corpus need to be on the node.
        window_shards: Shards in a window. Only with scope `windowed`.
    """

    scope: Literal["global", "windowed"] = "global"
    window_shards: Count = 8

    @model_validator(mode="after")
    def _windows_where_there_are_any(self) -> ShuffleSection:
        if self.scope == "global" and self.window_shards != 8:
            raise ValueError("window_shards has no effect here: set 'scope: windowed', or remove it")
        return self


class CacheSection(Values):
    """A cache of shards of remote corpora on each node, shared by its ranks and by other runs.

    Attributes:
        folder: The folder. Each node expands `~` and variables by itself.
        limit_gb: The folder never exceeds this many 10^9 bytes.
        downloads: Files of a corpus that are fetched ahead at a time.
    """

    folder: str = "~/.cache/evenkeel"
    limit_gb: Positive = 100.0
    downloads: int = Field(4, gt=0, le=256)

    @property
    def path(self) -> Path:
        """The folder as this node expands it. `folder` stays as it was written.

        Raises:
            UserError: where it cannot be expanded.
        """
        try:
            # The home may last only as long as this process.
            return Path(local(os.path.expanduser(self.folder)))
        except ValueError as error:
            raise UserError(f"data.cache.folder '{self.folder}': {error}.") from error


class BatchRampSection(Values):
    """A global batch that grows while the run reads its first tokens.

    Attributes:
        start: Sequences of the first step.
        end: Sequences per step after the ramp.
        ramp_tokens: The tokens after which the size is `end`.
        steps_of: The sequences by which it grows at a time.
    """

    start: Count
    end: Count
    ramp_tokens: float = Field(gt=0)
    steps_of: Count

    @model_validator(mode="after")
    def _whole_steps_up(self) -> BatchRampSection:
        if self.end <= self.start:
            raise at("end", f"{self.end} is not above start, {self.start}")
        if rest := (self.end - self.start) % self.steps_of:
            fitting = f"{self.end - rest} or {self.end - rest + self.steps_of}"
            raise at("end", f"{self.end} is not reached from {self.start} in steps of {self.steps_of}: take {fitting}")
        return self


def _form_of_batch(given: object) -> str:
    return "ramp" if isinstance(given, dict | BatchRampSection) else "number"


BatchSize: TypeAlias = Annotated[
    Annotated[Count, Tag("number")] | Annotated[BatchRampSection, Tag("ramp")], Discriminator(_form_of_batch)
]


class DataSection(Values):
    """The tokens and the batches that they form.

    Attributes:
        train: A shard folder or URL, or a list of corpora with their weights.
        val: A shard folder or URL. Null: no evaluation.
        seq_len: Tokens per sequence.
        global_batch_size: Sequences per optimizer step: a number, or a ramp.
        micro_batch_size: Sequences per data-parallel rank and forward pass.
        shuffle: The order of samples.
        packing: `concatenate` joins documents and cuts every `seq_len` tokens. `best_fit` keeps documents whole.
        document_attention: Attention and positions end with each document.
        verify: `full` compares every shard's checksum at start, `size` only its length.
        cache: Local copies of remote shards.
    """

    train: tuple[SourceSection, ...]
    val: Location | None = None
    seq_len: Count
    global_batch_size: BatchSize
    micro_batch_size: Count
    shuffle: ShuffleSection = ShuffleSection()
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    document_attention: bool = False
    verify: Literal["full", "size"] = "full"
    cache: CacheSection = CacheSection()

    @property
    def batch_sizes(self) -> BatchSizes:
        """The sequences of each step."""
        given = self.global_batch_size
        if isinstance(given, int):
            return BatchSizes.constant(given)
        return BatchSizes(given.start, given.end, given.steps_of, given.ramp_tokens / self.seq_len)

    @property
    def largest_batch(self) -> int:
        """The sequences of a step, after the ramp if there is one."""
        return self.batch_sizes.end

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
