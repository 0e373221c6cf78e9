"""One rank that loads a checkpoint into a plain DeepSpeed engine; started by elastic.py. The first rank prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain import quiet  # noqa: F401
from pretrain.checkpoints.elastic import load_stored
from pretrain.checkpoints.stored import stored_counters, stored_weights
from pretrain.distributed.ranks import initialize


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight."""
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(layers))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def main() -> None:
    asked = json.loads(sys.argv[1])
    ranks = initialize()
    source = Path(asked["source"])
    with redirect_stdout(StringIO()):
        engine = _engine(asked["layers"], universal=asked["way"] == "deepspeed")
    dist.barrier()
    began = time.perf_counter()
    if asked["way"] == "evenkeel":
        folder = source / "deepspeed"
        load_stored(engine, stored_weights(folder), stored_counters(folder), lambda line: None)
    elif asked["way"] == "deepspeed":
        engine.load_checkpoint(str(source))
    dist.barrier()
    if ranks.is_first:
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=2048, intermediate_size=5440, num_hidden_layers=layers, num_attention_heads=16)


def _engine(layers: int, universal: bool) -> Any:
    import deepspeed

    zero = {"stage": 3, "sub_group_size": 10**10}
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "checkpoint": {"load_universal": universal},
    }
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = LlamaForCausalLM(_config(layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]


if __name__ == "__main__":
    main()
