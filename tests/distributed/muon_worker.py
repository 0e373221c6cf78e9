"""Started by torchrun: trains tiny models with Muon, case by case, and writes down what it sees.

Every weight is read through DeepSpeed's own API.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.config import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.deepspeed_config import deepspeed_config
from pretrain.distributed import Ranks, initialize
from pretrain.engine import train_step
from pretrain.model import bind_methods, build_model, hf_config, initialize_weights
from pretrain.optim import build_optimizer
from pretrain.resilience.gate import Gate
from pretrain.resilience.guard import Guard
from pretrain.sharded import ShardedWeights

VOCABULARY, SEQUENCES, LENGTH, STEPS = 101, 12, 16, 4

# Tall and wide matrices. 30 and 44 leave ragged ends on 3 ranks, and slices that begin and end inside a matrix.
SIZES = {
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 14,
    "attention_bias": True,
}
# Adam's eps keeps it from blowing up the rounding noise that is the whole gradient of a key's bias.
OPTIM = {"name": "muon", "lr": 4e-3, "eps": 1e-4, "grad_clip": None, "muon": {"lr": 2e-3, "weight_decay": 0.3}}


class Tokenizer:
    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return VOCABULARY


def run_config(case: dict, ranks: int) -> Config:
    """The run of a case: {deepspeed, optim, accumulation, methods, idle, resume}."""
    return Config.model_validate(
        {
            "name": "case",
            "model": {"family": "llama", **SIZES},
            "tokenizer": "none",
            "data": {
                "train": "none",
                "seq_len": LENGTH,
                "global_batch_size": SEQUENCES,
                "micro_batch_size": SEQUENCES // ranks // case.get("accumulation", 1),
            },
            "steps": STEPS,
            "optim": {**OPTIM, **case.get("optim", {})},
            "methods": case.get("methods", []),
            "deepspeed": case["deepspeed"],
        }
    )


def batch(number: int) -> torch.Tensor:
    """The tokens of step `number`, the same on any number of ranks."""
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(number))


def learning_rate(number: int, peak: float, idle: int) -> float:
    """AdamW's at step `number`: another one at each step, none in the first `idle`, which only gather momentum."""
    return 0.0 if number <= idle else peak / number


def build(config: Config):
    """The gate of an engine without values, its weights, and the configuration with methods that know the run."""
    import deepspeed

    ds_config = deepspeed_config(config, dist.get_world_size())
    model_config = hf_config(config, Tokenizer())
    config = bind_methods(config, model_config)
    model = build_model(config, model_config, ds_config)
    with redirect_stdout(StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config), config=ds_config)
    return Gate(engine, Guard(config.resilience.guard)), ShardedWeights(engine), config


def masters(engine) -> dict[str, np.ndarray]:
    """Every full fp32 weight; without ZeRO in fp32 the API knows no master but the parameter."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: (safe_get_full_fp32_param(p), p) for name, p in engine.module.named_parameters()}
    return {name: (p.data if full is None else full).numpy().copy() for name, (full, p) in found.items()}


def train(gate: Gate, weights: ShardedWeights, config: Config, ranks: Ranks, numbers: range, idle: int) -> None:
    share = SEQUENCES // ranks.world_size
    for number in numbers:
        mine = batch(number)[ranks.rank * share : (ranks.rank + 1) * share]
        micro_batches = list(map(MicroBatch, mine.split(config.data.micro_batch_size)))
        train_step(gate, number, micro_batches, learning_rate(number, config.optim.lr, idle), ranks, masked=False)
        for method in config.methods:
            method.after_step(number, weights)


def edit(gate: Gate, weights: ShardedWeights, config: Config, ranks: Ranks) -> dict[str, bool]:
    """Whether `ShardedWeights` reads and changes the masters of this engine, and the change survives a step."""
    before, moments = masters(gate.engine), weights.moments()
    read = [np.isclose(moments[name].std, w.std(ddof=1, dtype=np.float64), rtol=1e-9) for name, w in before.items()]
    weights.rescale_(dict.fromkeys(before, (0.5, 0.0)))
    train(gate, weights, config, ranks, range(STEPS, STEPS + 1), idle=STEPS)
    kept = [np.array_equal(w, before[name] * np.float32(0.5)) for name, w in masters(gate.engine).items()]
    return {"moments_right": all(read), "rescaled_survives": all(kept)}


def examine(case: dict, ranks: Ranks, out: str) -> tuple[dict[str, np.ndarray], dict]:
    """The weights before and after training (and after training on from a checkpoint), and facts."""
    idle = case.get("idle", 0)
    gate, weights, config = build(run_config(case, ranks.world_size))
    initialize_weights(weights, config, 0.02)
    tables = {f"start/{name}": w for name, w in masters(gate.engine).items()}
    train(gate, weights, config, ranks, range(1, 3), idle)
    gate.engine.save_checkpoint(out, tag="two")
    train(gate, weights, config, ranks, range(3, STEPS + 1), idle)
    tables |= {f"end/{name}": w for name, w in masters(gate.engine).items()}
    facts = edit(gate, weights, config, ranks)
    resumed, weights, _ = build(config)
    resumed.engine.load_checkpoint(out, tag="two")
    train(resumed, weights, config, ranks, range(3, STEPS + 1), idle)
    facts["resume_exact"] = all(np.array_equal(w, tables[f"end/{name}"]) for name, w in masters(resumed.engine).items())
    return tables, facts


def main() -> None:
    ranks = initialize()
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    facts = {}
    for name, case in cases.items():
        tables, facts[name] = examine(case, ranks, str(out / name))
        if ranks.is_first:
            np.savez(out / f"{name}.npz", **tables)
    if ranks.is_first:
        (out / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    os._exit(0)  # taking down the process groups of so many engines, gloo aborts a rank now and then


if __name__ == "__main__":
    main()
