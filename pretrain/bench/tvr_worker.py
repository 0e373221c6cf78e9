"""One rank of the TVR measurement; started by bench/tvr.py with torchrun. Rank 0 prints one JSON line per model size."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.config import Config
from pretrain.deepspeed_config import deepspeed_config
from pretrain.distributed import initialize
from pretrain.methods.tvr import TVR
from pretrain.model import build_model, hf_config, initialize_weights
from pretrain.optim import build_optimizer
from pretrain.sharded import ShardedWeights

SEQ_LEN, GLOBAL_BATCH = 128, 8


class _Vocabulary:
    """Stands in for the tokenizer: the model needs only its size and special ids."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return 4096


def measure(hidden_size: int, layers: int, rounds: int) -> dict[str, float]:
    """Median seconds of a training step and of one application of each engine, every matrix rescaled."""
    import deepspeed

    world_size = dist.get_world_size()
    config = Config.model_validate(
        {
            "name": "bench",
            "model": {
                "family": "llama",
                "hidden_size": hidden_size,
                "intermediate_size": hidden_size * 8 // 3 // 8 * 8,
                "num_hidden_layers": layers,
                "num_attention_heads": hidden_size // 64,
            },
            "tokenizer": "",
            "data": {
                "train": "",
                "seq_len": SEQ_LEN,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": GLOBAL_BATCH // world_size,
            },
            "steps": 1,
            "optim": {"lr": 1e-3},
            "deepspeed": {"zero_optimization": {"stage": 3}},
        }
    )
    ds_config = deepspeed_config(config, world_size)
    model = build_model(config, hf_config(config, _Vocabulary()), ds_config)
    with redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config.optim), config=ds_config)
    initialize_weights(ShardedWeights(engine), (), 0.02, 0)
    tokens = torch.randint(0, 4096, (GLOBAL_BATCH // world_size, SEQ_LEN + 1), device=engine.device)

    def step() -> None:
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()

    contenders: dict[str, Callable[[], object]] = {"step": step}
    for name in ("sharded", "gathered"):
        # a threshold of 1 and targets that alternate: every application rescales every matrix
        targets = [
            TVR(engine=name, target_std=std, ratio_threshold=1, two_sided=True, interval_steps=1)
            for std in (0.01, 0.02)
        ]
        contenders[name] = lambda targets=targets: [method.after_step(1, engine) for method in targets]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            dist.barrier()
            seconds[name].append((time.perf_counter() - began) / (1 if name == "step" else 2))
    parameters = sum(weight.numel for weight in ShardedWeights(engine).layout.values())
    return {"parameters": parameters, **{name: statistics.median(values[1:]) for name, values in seconds.items()}}


def main() -> None:
    ranks = initialize()
    for hidden_size, layers in json.loads(sys.argv[1]):
        result = measure(hidden_size, layers, rounds=int(sys.argv[2]))
        if ranks.is_first:
            print(json.dumps({"ranks": ranks.world_size, **result}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
