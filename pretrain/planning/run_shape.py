"""The sizes of a run on so many ranks: its model, its layout and its batches, without its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pretrain.checkpoints.disk_space import checkpoint_bytes
from pretrain.config.schema import Config
from pretrain.data import load_tokenizer
from pretrain.engine.build_model import bind_methods, hf_config, outline
from pretrain.engine.deepspeed_config import accumulation_steps, deepspeed_config
from pretrain.engine.precision import precision_of
from pretrain.engine.sequence_parallel import check_heads
from pretrain.engine.tensor_parallel import check_model, data_ranks, elements_per_rank, zero_ranks
from pretrain.errors import UserError
from pretrain.model.layout import Weight
from pretrain.monitor.throughput import flops_per_token
from pretrain.optimizers import OPTIMIZERS
from pretrain.starting import model_of


@dataclass(frozen=True)
class RunShape:
    """The sizes of a run.

    Attributes:
        config: the configuration, with methods that are bound to the model.
        world_size: the number of ranks.
        model_config: the Hugging Face configuration of the model.
        ds_config: DeepSpeed's configuration, complete.
        weights: the layout of every weight that the model will have.
    """

    config: Config
    world_size: int
    model_config: PreTrainedConfig
    ds_config: dict[str, Any]
    weights: list[Weight]

    @property
    def parameters(self) -> int:
        """Elements of all weights, a tied one counted once."""
        return sum(weight.numel for weight in self.weights)

    @property
    def zero_stage(self) -> int:
        return self.ds_config["zero_optimization"].get("stage", 0)

    @property
    def optimizer_on_cpu(self) -> bool:
        offload = self.ds_config["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device") == "cpu"

    @property
    def precision(self) -> str:
        """The precision of the working copies: fp32, bf16 or fp16."""
        return precision_of(self.ds_config)

    @property
    def data_ranks(self) -> int:
        """The number of groups of ranks that read batches of their own. A group holds one rank unless `parallel` says more."""
        return data_ranks(self.config, self.world_size)

    @property
    def zero_ranks(self) -> int:
        """The number of ranks that ZeRO shares out each weight among."""
        return zero_ranks(self.config, self.world_size)

    @property
    def elements_per_rank(self) -> int:
        """The elements that one rank holds before ZeRO shards them."""
        return elements_per_rank(self.weights, self.config.parallel.tensor)

    @property
    def moment_bytes_per_rank(self) -> int:
        """The bytes of the optimizer's moments of what one rank holds before ZeRO shards it."""
        optimizer, tensor = OPTIMIZERS[self.config.optim.name], self.config.parallel.tensor
        return sum(optimizer.bytes_of(weight) * elements_per_rank([weight], tensor) for weight in self.weights)

    @property
    def accumulation_steps(self) -> int:
        """The micro-batches that each rank takes in one optimizer step."""
        return accumulation_steps(self.config, self.world_size)

    @property
    def tokens_per_micro_batch(self) -> int:
        """The tokens of a micro-batch that one rank computes on: its slice of each sequence."""
        return self.config.data.micro_batch_size * self.config.data.seq_len // self.config.parallel.sequence

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.weights, self.model_config, self.config.data.seq_len)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of one checkpoint on disk."""
        tensor = self.config.parallel.tensor  # each rank of a group stores the weights that are whole on all of them
        moments = tensor * (self.moment_bytes_per_rank + (4 * self.elements_per_rank if self.config.ema else 0))
        return checkpoint_bytes(tensor * self.elements_per_rank, moments, half=self.precision != "fp32")


def shape_of(config: Config, world_size: int) -> RunShape:
    """Return the sizes of a run, of which only the run file and its DeepSpeed file are read.

    Args:
        config: the configuration. Its tokenizer is read only where `model.vocab_size` is not given.
        world_size: the number of ranks.

    Raises:
        UserError: the layout does not divide the ranks, the batch or the model, or the size of the vocabulary is unknown.
    """
    config = model_of(config)
    ds_config = deepspeed_config(config, world_size)
    model_config = hf_config(config, _tokenizer(config))
    check_model(config, model_config)
    check_heads(config, model_config)
    config = bind_methods(config, model_config)
    return RunShape(config, world_size, model_config, ds_config, outline(config, model_config))


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer, or one of no tokens where the run file says how large the vocabulary is."""
    if "vocab_size" in config.model.hf_fields:
        return cast(PreTrainedTokenizerBase, _Unread(bos_token_id=None, eos_token_id=None))
    if not Path(config.tokenizer).exists():
        raise UserError(
            f"the size of the vocabulary is not known: there is no tokenizer at {config.tokenizer} yet. Train it first, or "
            "give model.vocab_size."
        )
    return load_tokenizer(config.tokenizer)


class _Unread(SimpleNamespace):
    def __len__(self) -> int:
        return 0
