"""A rank that trains a few steps for each case and writes the recorded figures beside those of one process."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.autopsy import Recorder
from pretrain.autopsy.step_samples import sequence_losses
from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.monitor.weight_monitor import WeightMonitor
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import LENGTH, VOCABULARY, gated, leave, share, tiny_config, tiny_plan, tokens
from tests.support.workers.sharded_worker import masters

SEQUENCES, STEPS, LR = 8, 4, 0.01
KEPT = 2  # steps before the newest, so that the first is forgotten
BROKEN = 3  # the step whose gradients are not finite from layer 2 down; its weights stay
# Two ranks cut these in the middle of a row.
SIZES: dict[str, Any] = {
    "hidden_size": 38,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 6,
}


def run_config(case: dict) -> Config:
    """Return the run of a case: {deepspeed, micro_batch_size, tensor, optim, unknown}."""
    optim = {"lr": LR, "weight_decay": 0.1, "grad_clip": 0.5}
    return tiny_config(
        case,
        model={**SIZES, "num_key_value_heads": 2},
        sequences=SEQUENCES,
        micro_batch_size=case["micro_batch_size"],
        steps=STEPS,
        optim={**optim, **case.get("optim", {})},
        activation_checkpointing=True,
    )


def dense(start: dict[str, np.ndarray], dtype: torch.dtype, number: int) -> dict:
    """Compute step `number` on one process, in float32, by transformers' own class and autograd: norms, extremes, losses."""
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_key_value_heads=2, **SIZES)
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(values).to(dtype).float() for name, values in start.items()})
    largest: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *seen: largest.append(float(seen[2].detach().abs().max())))
    whole = tokens(number, SEQUENCES)
    logits = model(whole[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), whole[:, 1:], reduction="none").mean(1)
    losses.mean().backward()
    return {
        "gradients": {name: float(_gradient(parameter).norm()) for name, parameter in model.named_parameters()},
        "activations": largest,
        "losses": losses.tolist(),
    }


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def break_backward(engine: Engine) -> None:
    """Let the next backward meet infinity on its way out of the second block."""

    def broken(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)
        handle.remove()

    handle = engine.module.model.layers[1].register_forward_hook(broken)


def unknown_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return an optimizer that `pretrain/optimizers` has no file of."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def examine(case: dict, ranks: Ranks) -> dict:
    plan = tiny_plan(run_config(case))
    with patch.object(build_engine, "build_optimizer", unknown_optimizer) if case.get("unknown") else nullcontext():
        gate = gated(plan)
    config = plan.config
    engine, weights = gate.engine, ShardedWeights(gate.engine)
    initialize_weights(weights, config, 0.1)
    monitor = WeightMonitor(weights, 1)
    recorder = Recorder(engine, weights, KEPT)
    gate.watchers.append(recorder.gradients)
    dtype = next(engine.module.parameters()).dtype
    expected = []
    for number in range(1, STEPS + 1):
        start, lr = masters(engine), LR / number
        micro_batches = share(MicroBatch(tokens(number, SEQUENCES)), config, ranks)
        monitor.before_step(number)
        if number == BROKEN and case.get("optim", {}).get("name") != "muon":
            break_backward(engine)
        done = train_step(gate, number, micro_batches, lr, ranks, masked=False)
        recorder.end_step(number, range(number, number + SEQUENCES), done.losses, lr, done.clip_factor)
        after = masters(engine)
        found = {
            "updates": {name: float(np.linalg.norm(after[name] - start[name])) for name in start},
            "monitored": {name: statistics["update_ratio"] for name, statistics in monitor.after_step(number).items()},
            **(dense(start, dtype, number) if ranks.is_first else {}),
        }
        expected.append(found)
        weights.rescale_(
            {"model.layers.0.mlp.up_proj.weight": (1.01, 0.0)}
        )  # as a method may; no step of the optimizer
    sequences = sequence_losses(engine, micro_batches, config.parallel, ranks)
    steps = [vars(step) | {"norms": {n: vars(of) for n, of in step.norms.items()}} for step in recorder.figures()]
    end = masters(engine)
    found = {"steps": steps, "expected": expected[-len(steps) :], "sequences": sequences}
    return found | ({"dense_sequences": dense(end, dtype, STEPS)["losses"]} if ranks.is_first else {})


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: the figures of each case go to `found.json` in the folder `out`."""
    allow_fp16_on_cpu()
    ranks = initialize()
    found = {name: examine(case, ranks) for name, case in cases.items()}
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found, default=list))
    leave()
