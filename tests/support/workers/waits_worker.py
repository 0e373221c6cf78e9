"""A rank that trains tiny models and counts the times at which the host would wait for a GPU."""

import json
from pathlib import Path

from pretrain.autopsy import Recorder
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.sharded import ShardedWeights
from tests.support.spy import Waits, pretend_to_be_asynchronous
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WARM = 3  # steps before it is counted: ZeRO-3 has recorded the order of modules, timers have begun


def waits(case: dict, ranks: Ranks) -> dict[str, int]:
    """Return the waits of one step after some, by place. case: {deepspeed, micro_batches}."""
    config = tiny_config(
        case,
        model=SIZES,
        sequences=ranks.world_size * case["micro_batches"],
        micro_batch_size=1,
        steps=WARM + 1,
        optim={"lr": 1e-3},
        methods=[{"name": "lir", "initializer_range": 0.02}],
    )
    plan = tiny_plan(config)
    gate = gated(plan)
    weights = ShardedWeights(gate.engine)
    initialize_weights(weights, plan.config, 0.02)
    recorder = Recorder(gate.engine, weights, 4)
    gate.watchers.append(recorder.gradients)
    spy = Waits()
    for step in range(1, WARM + 2):
        batches = share(MicroBatch(tokens(step, config.data.largest_batch)), plan.config, ranks)
        with spy:
            result = train_step(gate, step, batches, 1e-3, ranks, masked=False)
            recorder.end_step(step, range(step), result.losses, 1e-3, result.clip_factor)
    return dict(spy.places)


def count(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: write the waits of each case, in `found.json` in the folder `out`."""
    ranks = initialize()
    pretend_to_be_asynchronous()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        found[name] = waits(case, ranks)
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found))
    leave()
