"""Tiny models under real engines, for ranks that go through cases one after the other."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks
from pretrain.engine.build_engine import build_engine
from pretrain.engine.build_model import bind_methods, hf_config
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.step_gate import StepGate
from pretrain.engine.tensor_parallel import data_rank, data_ranks
from pretrain.optim.zclip import ZClip
from pretrain.resilience.spike_guard import SpikeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY, LENGTH = 101, 16


class TinyTokenizer:
    """The parts of a tokenizer that a model's configuration is made from."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.vocabulary


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a stand-in with VOCABULARY tokens."""
    return cast("PreTrainedTokenizerBase", TinyTokenizer())


def tiny_config(
    case: dict, *, model: dict, sequences: int, micro_batch_size: int, steps: int, documents: bool = False, **parts: Any
) -> Config:
    """Return the configuration of a run without files.

    Args:
        case: {deepspeed, tensor, sequence}, in which the cases of a file differ.
        documents: whether attention ends with each document.
    """
    data = {"seq_len": LENGTH, "global_batch_size": sequences, "micro_batch_size": micro_batch_size}
    data |= {"document_attention": documents}
    return Config.model_validate(
        {
            "name": "case",
            "model": {"family": "llama", **model},
            "tokenizer": "none",
            "data": {"train": "none", **data},
            "steps": steps,
            "parallel": {"tensor": case.get("tensor", 1), "sequence": case.get("sequence", 1)},
            "deepspeed": case["deepspeed"],
            **parts,
        }
    )


def tiny_plan(config: Config) -> SimpleNamespace:
    """Return the part of a plan that an engine is built from, with methods bound to the run."""
    model_config = hf_config(config, tiny_tokenizer())
    config = bind_methods(config, model_config)
    ds_config = deepspeed_config(config, dist.get_world_size())
    return SimpleNamespace(config=config, model_config=model_config, ds_config=ds_config)


def gated(plan: SimpleNamespace) -> StepGate:
    """Return the gate of a new engine, whose weights have no values yet."""
    zclip = plan.config.optim.zclip
    return StepGate(
        build_engine(plan.config, plan.model_config, plan.ds_config),
        SpikeGuard(plan.config.resilience.guard),
        zclip and ZClip(zclip),
    )


def tokens(number: int, sequences: int) -> torch.Tensor:
    """Return the tokens of batch `number`, (sequences, LENGTH + 1), the same on any number of ranks."""
    return torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(number))


def share(whole: MicroBatch, config: Config, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches that one rank reads of a global batch."""
    size = len(whole.tokens) // data_ranks(config, ranks.world_size)
    first, micro = data_rank(config, ranks.rank) * size, config.data.micro_batch_size
    return [
        MicroBatch(
            whole.tokens[row : row + micro],
            None if whole.counted is None else whole.counted[row : row + micro],
            None if whole.positions is None else whole.positions[row : row + micro],
        )
        for row in range(first, first + size, micro)
    ]


def forget_garbage() -> None:
    """Freeze all live objects: DeepSpeed collects garbage whenever it makes an engine, which takes long with the libraries."""
    gc.collect()
    gc.freeze()


def leave() -> NoReturn:
    """End a rank that has had dozens of engines, without gloo's teardown, which sometimes aborts such a process."""
    dist.barrier()
    os._exit(0)
