"""A rank that trains tiny models with Muon, case by case, and writes down their weights.

Every weight is read through DeepSpeed's own API.
"""

import json
from pathlib import Path

import numpy as np

from pretrain import quiet  # noqa: F401
from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.engine.step_gate import StepGate
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.arrays import save_arrays
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens

SEQUENCES, STEPS = 12, 4

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


def run_config(case: dict, ranks: int) -> Config:
    """Return the run of a case: {deepspeed, optim, accumulation, methods, idle, resume}. An `optim` with a name is the whole."""
    optim = case.get("optim", {})
    return tiny_config(
        case,
        model=SIZES,
        sequences=SEQUENCES,
        micro_batch_size=SEQUENCES // ranks // case.get("accumulation", 1),
        steps=STEPS,
        optim=optim if "name" in optim else {**OPTIM, **optim},
        methods=case.get("methods", []),
    )


def learning_rate(number: int, peak: float, idle: int) -> float:
    """Return AdamW's rate at step `number`: another one at each step, 0 in the first `idle`, which only gather momentum."""
    return 0.0 if number <= idle else peak / number


def build(config: Config) -> tuple[StepGate, ShardedWeights, Config]:
    """Return the gate of an engine without values, its weights, and the configuration with methods bound to the run."""
    plan = tiny_plan(config)
    gate = gated(plan)
    return gate, ShardedWeights(gate.engine), plan.config


def masters(engine: Engine) -> dict[str, np.ndarray]:
    """Return every full fp32 weight. Without ZeRO in fp32 the parameter itself is the master."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: (safe_get_full_fp32_param(p), p) for name, p in engine.module.named_parameters()}
    return {name: (p.data if full is None else full).numpy().copy() for name, (full, p) in found.items()}


def train(gate: StepGate, weights: ShardedWeights, config: Config, ranks: Ranks, numbers: range, idle: int) -> None:
    for number in numbers:
        micro_batches = share(MicroBatch(tokens(number, SEQUENCES)), config, ranks)
        train_step(gate, number, micro_batches, learning_rate(number, config.optim.lr, idle), ranks, masked=False)
        for method in config.methods:
            method.after_step(number, weights)


def edit(gate: StepGate, weights: ShardedWeights, config: Config, ranks: Ranks) -> dict[str, bool]:
    """Return whether `ShardedWeights` reads and changes the masters of this engine, and the change survives a step."""
    before, moments = masters(gate.engine), weights.moments()
    read = [np.isclose(moments[name].std, w.std(ddof=1, dtype=np.float64), rtol=1e-9) for name, w in before.items()]
    weights.rescale_(dict.fromkeys(before, (0.5, 0.0)))
    train(gate, weights, config, ranks, range(STEPS, STEPS + 1), idle=STEPS)
    kept = [np.array_equal(w, before[name] * np.float32(0.5)) for name, w in masters(gate.engine).items()]
    return {"moments_right": all(read), "rescaled_survives": all(kept)}


def examine(case: dict, ranks: Ranks, out: str) -> tuple[dict[str, np.ndarray], dict]:
    """Return the weights before and after training, and checks: of edits, and of a run resumed from a checkpoint."""
    idle = case.get("idle", 0)
    gate, weights, config = build(run_config(case, ranks.world_size))
    initialize_weights(weights, config, 0.02)
    tables = {f"start/{name}": w for name, w in masters(gate.engine).items()}
    train(gate, weights, config, ranks, range(1, 3), idle)
    gate.engine.save_checkpoint(out, tag="two", save_latest=True)
    train(gate, weights, config, ranks, range(3, STEPS + 1), idle)
    tables |= {f"end/{name}": w for name, w in masters(gate.engine).items()}
    checks = edit(gate, weights, config, ranks)
    resumed, weights, _ = build(config)
    resumed.engine.load_checkpoint(out, tag="two")
    train(resumed, weights, config, ranks, range(3, STEPS + 1), idle)
    checks["resume_exact"] = all(
        np.array_equal(w, tables[f"end/{name}"]) for name, w in masters(resumed.engine).items()
    )
    return tables, checks


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `checks.json`, and the weights of each case, go to the folder `out`."""
    ranks = initialize()
    checks = {}
    for name, case in cases.items():
        forget_garbage()
        tables, checks[name] = examine(case, ranks, str(out / name))
        if ranks.is_first:
            save_arrays(out / f"{name}.npz", tables)
    if ranks.is_first:
        (out / "checks.json").write_text(json.dumps(checks))
    leave()
