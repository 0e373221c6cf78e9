"""A rank that trains on batches whose targets do not all count, case by case, and writes down the losses."""

import json
from pathlib import Path

import numpy as np
import torch

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.engine.validation import validation_loss
from pretrain.model.loss import loss_head
from pretrain.sharded import ShardedWeights
from tests.support.arrays import save_arrays
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import LENGTH, VOCABULARY, forget_garbage, gated, leave, share, tiny_config, tiny_plan
from tests.support.workers.muon_worker import masters

SEQUENCES, STEPS, LR = 8, 3, 5.0
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
METHODS = [{"name": "z_loss", "coefficient": 0.02}, {"name": "mu_loss", "coefficient": 20.0}]
# With so large an eps AdamW's step grows with the gradient: one of the wrong size shows in the next loss.
OPTIM = {"lr": LR, "eps": 1.0, "weight_decay": 0.0, "grad_clip": None, "schedule": {"name": "constant"}}


def run_config(case: dict) -> Config:
    """Return the run of a case: {deepspeed, micro_batch_size, tensor, sequence}."""
    return tiny_config(
        case,
        model={**SIZES, "num_key_value_heads": 2},
        sequences=SEQUENCES,
        micro_batch_size=case["micro_batch_size"],
        steps=STEPS,
        optim=OPTIM,
        methods=METHODS,
        documents=True,
        activation_checkpointing=True,
    )


def batch(number: int) -> MicroBatch:
    """Return the global batch of step `number`: two sequences without a target, one with one, the others with ever more.

    Each holds two documents.
    """
    generator = torch.Generator().manual_seed(number)
    whole = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    counted = torch.rand(SEQUENCES, LENGTH, generator=generator) < torch.linspace(-0.2, 1.0, SEQUENCES)[:, None]
    counted[:2], counted[2] = False, torch.arange(LENGTH) == 5
    begins = torch.randint(1, LENGTH, (SEQUENCES, 1), generator=generator)
    places = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    return MicroBatch(whole, counted, torch.where(places < begins, places, places - begins))


def examine(case: dict, ranks: Ranks) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the losses of each step and of a validation afterwards, and the weights at the start."""
    plan = tiny_plan(run_config(case))
    gate, config = gated(plan), plan.config
    loss_head(gate.engine.module).chunk_logits = 7 * VOCABULARY
    initialize_weights(ShardedWeights(gate.engine), config, 0.02)
    start = masters(gate.engine) if config.parallel.tensor == 1 else {}
    steps = []
    for number in range(STEPS):
        done = train_step(
            gate, number + 1, share(batch(number), config, ranks), LR, ranks, masked=case.get("masked", True)
        )
        steps.append({name: float(value) for name, value in done.losses.items()})
    held_out = share(batch(STEPS), config, ranks)
    validation = validation_loss(gate.engine, held_out, ranks, stopped=lambda: False)
    return {"steps": steps, "validation": validation}, start


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `found.json` and the initial weights of each case go to the folder `out`."""
    allow_fp16_on_cpu()
    ranks = initialize()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        found[name], start = examine(case, ranks)
        if ranks.is_first and start:
            save_arrays(out / f"{name}.npz", start)
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found))
    leave()
