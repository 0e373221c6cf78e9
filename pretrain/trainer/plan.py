"""The plan of a run: everything that is known before it starts, checked.

`make_plan` reads and checks the whole input (model, tokenizer, shards, DeepSpeed file, methods) without building the
model. `--dry-run` prints the plan, and training starts from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from pretrain.checkpoints import TrainerState
from pretrain.checkpoints.logit_probe import probe_batch
from pretrain.config.distributions import DeviationsSection
from pretrain.config.schema import Config
from pretrain.data import load_tokenizer
from pretrain.data.batches.batch import MicroBatch
from pretrain.data.batches.loader import Loader, eval_batches
from pretrain.data.tokenizer_files import trained_files
from pretrain.engine.build_model import bind_methods, hf_config, outline
from pretrain.engine.deepspeed_config import deepspeed_config, read_deepspeed
from pretrain.engine.initialize import initial_rule
from pretrain.engine.sequence_parallel import check_heads
from pretrain.engine.tensor_parallel import check_model, data_rank, data_ranks
from pretrain.errors import UserError
from pretrain.files import free_bytes, require_utf8
from pretrain.methods import Method
from pretrain.model.layout import Weight
from pretrain.planning.run_shape import RunShape
from pretrain.starting import StartingPoint, model_of, starting_point
from pretrain.trainer.corpora import Corpora, open_corpora

# The least and the largest for a matrix: the squares in its moments must be float32 numbers, and its elements fp16 numbers.
_INITIAL_DEVIATIONS = (1e-15, 1e4)


@dataclass(frozen=True)
class Plan(RunShape):
    """A run that has been checked: its model, its data and its length.

    The configuration has the content of the DeepSpeed file, and methods that are bound to the model.

    Attributes:
        tokenizer_files: the files of the run's tokenizer as checkpoints keep it, by name.
        corpora: the data.
        start: the model whose weights it starts from; None where they are drawn.
    """

    tokenizer_files: dict[str, bytes]
    corpora: Corpora
    start: StartingPoint | None

    def state_at(self, step: int, samples: int) -> TrainerState:
        """Return the state that a checkpoint of this run stores after `step` steps and `samples` samples of all ranks."""
        return TrainerState(
            step=step,
            samples=samples,
            world_size=self.world_size,
            tensor_parallel=self.config.parallel.tensor,
            zero_stage=self.zero_stage,
            precision=self.precision,
            model=self.model_config.to_diff_dict(),
            forward=_digest_of_forward(self.config, self.weights),
            optimizer=self.config.optim.name,
            data_fingerprint=self.corpora.fingerprint,
            tokenizer_fingerprint=self.corpora.tokenizer_fingerprint,
            bos_id=self.corpora.bos_id,
            seed=self.config.seed,
            seq_len=self.config.data.seq_len,
            global_batch_size=self.config.data.largest_batch,
            batch_ramp=_ramp_of(self.config),
        )


def make_plan(config: Config, world_size: int, rank: int | None = None) -> Plan:
    """Check the input of `config` for a run on `world_size` ranks.

    The plan's configuration holds the content of the DeepSpeed file, so that it alone reproduces the run.

    Args:
        rank: the rank that verifies its share of the shards. None verifies all of them.

    Raises:
        UserError: something in the input is wrong, or does not fit the rest.
    """
    require_utf8(config.folder, "the run folder")
    config = model_of(config)
    ds_config = deepspeed_config(config, world_size)
    config = config.model_copy(update={"deepspeed": read_deepspeed(config)[1]})
    tokenizer = load_tokenizer(config.tokenizer)
    model_config = hf_config(config, tokenizer)
    check_model(config, model_config)
    check_heads(config, model_config)
    config = bind_methods(config, model_config)
    weights = outline(config, model_config)
    for method in config.methods:
        method.check(weights)
        _check_touches(method, weights)
    start = None
    if config.model.init_from is None:
        _check_initial_values(config, weights, model_config.initializer_range)
    else:
        plain = config.model_copy(update={"methods": ()})
        plain_weights = outline(plain, hf_config(plain, tokenizer))
        start = starting_point(config, tokenizer, weights, plain_weights, _digest_of_forward(config, weights))
    share = {} if rank is None else {"rank": rank, "world_size": world_size}
    corpora = open_corpora(config, tokenizer, data_ranks(config, world_size), **share)
    _set_bos(model_config, config, tokenizer.eos_token_id if corpora.bos_id is None else corpora.bos_id)
    files = trained_files(tokenizer, Path(config.tokenizer), corpora.bos_id)
    plan = Plan(config, world_size, model_config, ds_config, weights, files, corpora, start)
    if corpora.val is not None:
        validation_batches(plan, rank=0)
    _check_disk(plan)
    return plan


def _set_bos(model_config: PreTrainedConfig, config: Config, bos_id: int | None) -> None:
    """Set the model's bos_token_id to the token before every document: its own, or the separator of the one before.

    The separator is the tokenizer's: model.eos_token_id says where generation ends, and may be several tokens.
    """
    if (asked := config.model.hf_fields.get("bos_token_id", bos_id)) != bos_id:
        raise UserError(
            f"model.bos_token_id is {asked}, and what stands before every document in {config.data.train[0].path} is "
            f"{bos_id}. Leave the key out, or prepare the data again (tools/prepare_data.py, --add-bos)."
        )
    model_config.bos_token_id = bos_id


def _digest_of_forward(config: Config, weights: Sequence[Weight]) -> str:
    """Return a digest of the weights' names and shapes, and of the methods that change the forward pass, with options."""
    acting = [method for method in config.methods if method.acts_in_forward()]
    lines = [f"{weight.name} {weight.shape}" for weight in weights]
    lines += sorted(method.forward_identity() for method in acting)
    return blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _ramp_of(config: Config) -> dict[str, float] | None:
    """Return what decides the size of each step, None where all have one size."""
    given = config.data.global_batch_size
    return None if isinstance(given, int) else given.model_dump()


def _check_touches(method: Method, weights: list[Weight]) -> None:
    """Raise UserError if the method has no rule for any weight: it would be listed and do nothing."""
    if not any(method.init_rule(weight) or method.training_rule(weight) for weight in weights):
        raise UserError(f"methods: {method.name} matches no weight of the model, so it would do nothing. Remove it.")


def _check_initial_values(config: Config, weights: list[Weight], default_std: float) -> None:
    """Raise UserError if a weight would start beyond what float32 arithmetic holds, or all matrices at zero."""
    smallest, largest = _INITIAL_DEVIATIONS
    roles = dict.fromkeys(weight.role for weight in weights)
    if absent := sorted(config.init.deviations.keys() - roles.keys()):
        raise UserError(
            f"init.std.{absent[0]} matches no weight of the model, so it would do nothing. Its matrices are "
            f"{', '.join(role for role in roles if role in DeviationsSection.model_fields)}"
            + ("; the head's is the embedding's." if absent[0] == "head" else ".")
        )
    rules = {weight.name: initial_rule(weight, config, default_std) for weight in weights if weight.fan_in}
    for name, (draw, rule) in rules.items():
        if draw.std and not smallest <= draw.std <= largest:
            raise UserError(
                f"{name} would start with the standard deviation {draw.std:g} ({rule}); training holds {smallest:g} to "
                f"{largest:g}. Change what decides it: model.initializer_range, or the option of a method."
            )
    if not any(draw.std for draw, _ in rules.values()):
        raise UserError(
            "all matrices would start at zero, and no gradient would change them: raise model.initializer_range."
        )


def training_batches(plan: Plan, rank: int, samples: int) -> Loader:
    """Return the batches of rank `rank` after the run's first `samples` samples.

    The ranks of a tensor-parallel group have the same batches, and so have those that share sequences.
    """
    data = plan.config.data
    return Loader(
        plan.corpora.feed(),
        global_batch_size=data.batch_sizes,
        micro_batch_size=data.micro_batch_size,
        rank=data_rank(plan.config, rank),
        world_size=plan.data_ranks,
        position=samples,
        pin_memory=torch.cuda.is_available(),
    )


def validation_batches(plan: Plan, rank: int) -> Iterator[MicroBatch]:
    """Return the micro-batches of one evaluation for rank `rank`, the same at every call. The run has validation data."""
    data, val = plan.config.data, plan.corpora.val
    assert val is not None
    return eval_batches(
        val,
        global_batch_size=data.largest_batch,
        micro_batch_size=data.micro_batch_size,
        rank=data_rank(plan.config, rank),
        world_size=plan.data_ranks,
        batches=plan.config.eval.batches,
    )


def fixed_probe(plan: Plan) -> torch.Tensor:
    """Return the batch whose logits every checkpoint of the run stores: the first training tokens, (2, length) int64."""
    tokens = plan.corpora.sources[0].shards.head(4096)
    return probe_batch(torch.from_numpy(tokens.astype("int64")), plan.config.data.seq_len)


def _check_disk(plan: Plan) -> None:
    """Raise UserError unless the run folder can be written and there is room for one checkpoint."""
    existing, one = existing_folder(plan.config), plan.checkpoint_bytes
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to the run folder {plan.config.folder}: {existing} is not a writable folder.")
    free = free_bytes(existing)
    if free is not None and free < one:
        raise UserError(f"one checkpoint needs {one / 1e9:.2f} GB but {existing} has {free / 1e9:.2f} GB free.")


def existing_folder(config: Config) -> Path:
    """Return the run folder, or the nearest folder above it that exists."""
    folder = config.folder.absolute()
    try:
        return next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise UserError(f"cannot reach the run folder {config.folder}: {error.strerror}.") from error
