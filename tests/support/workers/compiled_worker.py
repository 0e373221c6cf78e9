"""A rank that trains tiny models eagerly and compiled, case by case, and writes down losses, weights and graphs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from pretrain.checkpoints.logit_probe import probe_logits
from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.engine.validation import validation_loss
from pretrain.monitor.activations import LargestActivations, record_activations
from pretrain.sharded import ShardedWeights
from tests.support.arrays import save_arrays
from tests.support.method_suite import reference
from tests.support.tiny_engines import LENGTH, forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens
from tests.support.workers.muon_worker import masters

SEQUENCES, STEPS, LAYERS, LR = 8, 2, 3, 1e-3
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"family": "gpt2", "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": LENGTH}
UNDROPPED = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def run_config(case: dict) -> Config:
    """Return the run of a case: {deepspeed, methods, compile, recomputed, tensor, sequence, gpt2}."""
    return tiny_config(
        case,
        model=GPT2 | UNDROPPED if case.get("gpt2") else LLAMA,
        sequences=SEQUENCES,
        micro_batch_size=2,
        steps=STEPS,
        optim={"lr": LR, "eps": 1e-3},  # so large that a gradient of the wrong size shows
        methods=[{"name": name, **reference(name).OPTIONS} for name in case.get("methods", ())],
        compile=case["compile"],
        activation_checkpointing=case.get("recomputed", "off"),
    )


def examine(case: dict, ranks: Ranks) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what was found, and the weights after the last step.

    Found are the losses of each step, a validation loss, logits of a probe of another shape, the largest activations in
    training and on the probe, the graphs for training and in all, and the breaks.
    """
    torch._dynamo.reset()
    counters.clear()
    plan = tiny_plan(run_config(case))
    gate, config = gated(plan), plan.config
    weights, model = ShardedWeights(gate.engine), gate.engine.module
    initialize_weights(weights, config, 0.02)
    for method in config.methods:
        method.prepare(weights)
    largest = LargestActivations(model, ranks.device)
    losses = []
    for number in range(1, STEPS + 1):
        whole = MicroBatch(tokens(number, SEQUENCES))
        done = train_step(gate, number, share(whole, config, ranks), LR, ranks, masked=False)
        for method in config.methods:
            method.after_step(number, weights)
        losses.append(float(done.losses["total"]))
    graphs = counters["stats"]["unique_graphs"]
    held_out = share(MicroBatch(tokens(0, SEQUENCES)), config, ranks)
    validation = validation_loss(gate.engine, held_out, ranks, stopped=lambda: False)
    with record_activations(model) as rows:
        logits = probe_logits(model, tokens(99, 2)[:, : LENGTH - 5])
    found = {
        "losses": losses,
        "validation": validation,
        "logits": logits.flatten()[:50].tolist(),
        "activations": largest.take().tolist(),
        "on the probe": [row["top"] for row in rows],
        "graphs of training": graphs,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }
    return found, masters(gate.engine) if config.parallel.tensor == 1 else {}


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `found.json` and the last weights of each case go to the folder `out`."""
    compiler = torch.compile
    ranks = initialize()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        torch.compile = partial(compiler, backend=case.get("backend", "aot_eager"))
        found[name], weights = examine(case, ranks)
        if ranks.is_first:
            save_arrays(out / f"{name}.npz", weights)
            (out / "found.json").write_text(json.dumps(found))
    leave()
