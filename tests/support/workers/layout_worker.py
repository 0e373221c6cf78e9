"""A rank that takes ten steps with LIR and TVR, layout by layout, and writes down losses, gradient norms and weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.sharded import ShardedWeights, gathered
from tests.support.arrays import save_arrays
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens

SEQUENCES, STEPS, LR = 48, 10, 4e-3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KV_HEADS, EPS = 2, 1e-5
TVR = {"target_std": 0.05, "ratio_threshold": 1.02, "interval_steps": 3}
OPTIM = {"lr": LR, "eps": 1e-6, "weight_decay": 0.1, "grad_clip": 0.5, "schedule": {"name": "constant"}}


def run_config(case: dict) -> Config:
    """Return the run of a case: {deepspeed, micro_batch_size, tensor, sequence}."""
    return tiny_config(
        case,
        model={**SIZES, "num_key_value_heads": KV_HEADS, "rms_norm_eps": EPS},
        sequences=SEQUENCES,
        micro_batch_size=case["micro_batch_size"],
        steps=STEPS,
        optim=OPTIM,
        methods=[{"name": "lir", "initializer_range": 0.1}, {"name": "tvr", **TVR}],
    )


def examine(case: dict, ranks: Ranks) -> tuple[dict[str, list], dict[str, np.ndarray]]:
    """Return the loss and the gradient norm of each step, and all weights at the start and at the end."""
    plan = tiny_plan(run_config(case))
    gate, config = gated(plan), plan.config
    weights = ShardedWeights(gate.engine)
    initialize_weights(weights, config, 0.02)
    for method in config.methods:
        method.prepare(weights)
    kept = copies("initial", weights)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batches = share(MicroBatch(tokens(step, SEQUENCES)), config, ranks)
        done = train_step(gate, step, batches, LR, ranks, masked=False)
        losses.append(float(done.losses["total"]))
        norms.append(done.norm)
        for method in config.methods:
            method.after_step(step, weights)
    return {"losses": losses, "norms": norms}, kept | copies("final", weights)


@torch.no_grad()
def copies(when: str, weights: ShardedWeights) -> dict[str, np.ndarray]:
    return {f"{when}/{name}": full.cpu().numpy().copy() for name, full in gathered(weights)}


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `found.json` and the weights of each case go to the folder `out`."""
    ranks = initialize()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        found[name], weights = examine(case, ranks)
        if ranks.is_first:
            save_arrays(out / f"{name}.npz", weights)
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found))
    leave()
