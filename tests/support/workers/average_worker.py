"""A rank that trains tiny models with an average of their weights, case by case, and writes down what it saw.

Every weight is read through DeepSpeed's own API.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import losses_of, train_step
from pretrain.engine.weight_average import WeightAverage
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.arrays import save_arrays
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens
from tests.support.workers.muon_worker import masters

SEQUENCES, STEPS, DECAY = 4, 4, 0.6
SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}


def read(engine: Engine, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return every full master, none for a case whose masters DeepSpeed's API does not give."""
    return {} if case.get("unread") else masters(engine)


def trained(case: dict[str, Any], ranks: Ranks, decay: float | None) -> tuple[Any, ...]:
    """Return the gate, its weights, their average and the masters after each step."""
    plan = tiny_plan(
        tiny_config(
            case,
            model=SIZES,
            sequences=SEQUENCES,
            micro_batch_size=SEQUENCES // max(1, ranks.world_size // case.get("tensor", 1)),
            steps=STEPS,
            optim={"lr": 2e-2, **case.get("optim", {})},
            methods=case.get("methods", []),
        )
    )
    gate = gated(plan)
    weights = ShardedWeights(gate.engine)
    average = WeightAverage(weights, plan.config.methods, decay)
    initialize_weights(weights, plan.config, 0.02)
    for method in plan.config.methods:
        method.prepare(weights)
    after = []
    for number in range(1, STEPS + 1):
        batches = share(MicroBatch(tokens(number, SEQUENCES)), plan.config, ranks)
        train_step(gate, number, batches, 2e-2, ranks, masked=False)
        for method in plan.config.methods:
            method.after_step(number, weights)
        average.update()
        after.append(read(gate.engine, case))
    return gate, weights, average, after


def examine(case: dict[str, Any], ranks: Ranks) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the masters after each step and the average, and checks of what forward computes with it."""
    gate, weights, average, after = trained(case, ranks, DECAY)
    batch = MicroBatch(tokens(99, SEQUENCES))

    @torch.no_grad()
    def loss() -> float:
        gate.engine.eval()
        return float(losses_of(gate.engine, batch)["total"])

    before, moments = loss(), weights.moments()
    with average.in_place_of_weights():
        found = read(gate.engine, case)
        inside, of_average = loss(), weights.moments()
    tables = {f"{number}/{name}": w for number, table in enumerate(after, start=1) for name, w in table.items()}
    tables |= {f"average/{name}": w for name, w in found.items()}
    again = read(gate.engine, case)
    plain = trained(case, ranks, None)[3][-1]
    return tables, {
        "last": before,
        "inside": inside,
        "changed": of_average != moments,
        "restored": all(np.array_equal(w, after[-1][name]) for name, w in again.items())
        and weights.moments() == moments,
        "same_loss": loss() == before,
        "same_training": all(np.array_equal(w, plain[name]) for name, w in after[-1].items()),
    }


def examine_all(cases: dict[str, dict[str, Any]], out: Path) -> None:
    """Be a rank: `checks.json`, and the weights of each case, go to the folder `out`."""
    ranks, checks = initialize(), {}
    for name, case in cases.items():
        forget_garbage()
        tables, checks[name] = examine(case, ranks)
        if ranks.is_first:
            save_arrays(out / f"{name}.npz", tables)
    if ranks.is_first:
        (out / "checks.json").write_text(json.dumps(checks), encoding="utf-8")
    leave()
