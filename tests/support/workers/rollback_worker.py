"""A rank that trains, goes back to a checkpoint with the same engine and with a new one, and trains on."""

import json
from pathlib import Path

import torch

from pretrain.checkpoints import Checkpoints, TrainerState
from pretrain.config.schema import CheckpointSection, Config
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import leave, share, tiny_plan
from tests.support.workers.masked_worker import LR, batch, run_config

BEFORE, AFTER = 2, 3  # steps before the checkpoint, and after it


def state_at(step: int) -> TrainerState:
    return TrainerState(step, 8 * step, 2, 0, "", {}, "", "", 0, 16, 8)


def train(engine: Engine, config: Config, ranks: Ranks, first: int, last: int) -> list[float]:
    """Take steps `first` to `last`; return this rank's losses, and a draw of its generator after each step."""
    seen = []
    for step in range(first, last + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        for micro_batch in share(batch(step), config, ranks):
            loss = engine(micro_batch.inputs, micro_batch.targets, divisor=None, position_ids=micro_batch.positions)[
                "total"
            ]
            engine.backward(loss)
            engine.step()
            seen.append(float(loss.detach()))
        seen.append(float(torch.rand(())))
    return seen


def examine(case: dict, folder: Path, ranks: Ranks) -> dict:
    plan = tiny_plan(run_config(case))
    config = plan.config
    checkpoints = Checkpoints(folder, CheckpointSection(asynchronous=case["asynchronous"]), ranks, print)
    engine = build_engine(plan.config, plan.model_config, plan.ds_config)
    weights = ShardedWeights(engine)
    initialize_weights(weights, config, 0.02)
    before = train(engine, config, ranks, 1, BEFORE)
    checkpoints.save(engine, state_at(BEFORE), lambda folder: None)
    first = train(engine, config, ranks, BEFORE + 1, BEFORE + AFTER)
    first_weights = weights.moments()
    saved = checkpoints.advance(wait=True)
    assert (saved is None) != case["asynchronous"]

    found = checkpoints.find_before(BEFORE + 1)
    assert found is not None
    loaded = checkpoints.load(found, engine, state_at(0))
    again = train(engine, config, ranks, BEFORE + 1, BEFORE + AFTER)
    again_weights = weights.moments()

    resumed = build_engine(plan.config, plan.model_config, plan.ds_config)
    checkpoints.load(found, resumed, state_at(0))
    in_new_engine = train(resumed, config, ranks, BEFORE + 1, BEFORE + AFTER)
    new_engine_weights = ShardedWeights(resumed).moments()
    return {
        "before": before,
        "first": first,
        "again": again,
        "in_new_engine": in_new_engine,
        "loaded": loaded.step,
        "earlier": str(checkpoints.find_before(BEFORE - 1)),
        "weights": [again_weights == first_weights, new_engine_weights == first_weights],
    }


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `found_<rank>.json` of each rank goes to the folder `out`."""
    allow_fp16_on_cpu()
    ranks = initialize()
    found = {name: examine(case, out / name, ranks) for name, case in cases.items()}
    (out / f"found_{ranks.rank}.json").write_text(json.dumps(found))
    leave()
