"""A rank that trains tiny models, case by case, damages some steps on purpose, and writes down what followed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import pretrain.engine.step
from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.engine.step_gate import StepGate
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.arrays import save_arrays
from tests.support.faults import replace
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens
from tests.support.workers.muon_worker import SEQUENCES, masters
from tests.support.workers.muon_worker import SIZES as TWO_LAYERS

SIZES = {**TWO_LAYERS, "num_hidden_layers": 1}
LR = 1e-3
ADAMW = {"lr": LR, "eps": 1e-6, "weight_decay": 0.1}

# Kinds of damaged days: factors of the loss and of its gradient on the last rank's last micro-batch.
HARM = {
    "NaN loss": (float("nan"), float("nan")),
    "loss spike": (30.0, 1.0),
    "NaN gradient": (1.0, float("nan")),
    "infinite gradient": (1.0, float("inf")),
    "gradient spike": (1.0, 1000.0),
}
EVERYWHERE = 30.0  # factor of every gradient on the day of that name


class Harmed(torch.autograd.Function):
    """A loss and its gradient, multiplied by factors of their own."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, of_loss: float, of_gradient: float) -> torch.Tensor:
        ctx.factor = of_gradient
        return loss * of_loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient * ctx.factor, None, None


def run_config(case: dict, ranks: int) -> Config:
    """Return the run of a case: {deepspeed, optim, guard, tensor}, two micro-batches a step and data-parallel rank."""
    tensor = case.get("tensor", 1)
    guard = {"spikes": "skip", "sigma": 20, "window_steps": 8, **case.get("guard", {})}
    return tiny_config(
        case,
        model=SIZES if tensor == 1 else {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2},
        sequences=SEQUENCES,
        micro_batch_size=SEQUENCES // (ranks // tensor) // 2,
        steps=100,
        optim={**ADAMW, **case.get("optim", {})},
        resilience={"guard": guard},
    )


def build(case: dict, ranks: Ranks) -> tuple[StepGate, Config]:
    plan = tiny_plan(run_config(case, ranks.world_size))
    gate = gated(plan)
    initialize_weights(ShardedWeights(gate.engine), plan.config, 0.02)
    return gate, plan.config


def live(gate: StepGate, config: Config, days: list[str], ranks: Ranks) -> list[dict]:
    """Train a step a day and return the result of each. Good days have batches of their own, whatever lies between."""
    results, good = [], 0
    for number, day in enumerate(days, start=1):
        good += day == "good"
        whole = tokens(good if day in ("good", "everywhere") else 1000 + number, SEQUENCES)
        micro_batches = share(MicroBatch(whole), config, ranks)
        with Harming(day, len(micro_batches), ranks):
            done = train_step(gate, number, micro_batches, LR, ranks, masked=False)
        results.append(
            {
                "kind": done.verdict.kind,
                "skipped": done.skipped,
                "norm": done.norm,
                "factor": done.clip_factor,
                "loss_scale": done.loss_scale,
                "streak": gate.guard.streak,
            }
        )
    return results


class Harming:
    """A context in which the losses of the engine's forward are those of such a day."""

    def __init__(self, day: str, micro_batches: int, ranks: Ranks) -> None:
        self.day, self.last, self.calls = day, micro_batches, 0
        self.here = ranks.rank == ranks.world_size - 1

    def __enter__(self) -> None:
        self.plain = pretrain.engine.step.losses_of
        if self.day != "good":
            replace(pretrain.engine.step, "losses_of", self.losses)

    def __exit__(self, *_: object) -> None:
        replace(pretrain.engine.step, "losses_of", self.plain)

    def losses(self, engine: Engine, *given: Any) -> dict[str, torch.Tensor]:
        found, self.calls = self.plain(engine, *given), self.calls + 1
        if self.day == "everywhere":
            return {**found, "total": Harmed.apply(found["total"], 1.0, EVERYWHERE)}
        if self.here and self.calls == self.last:
            return {**found, "total": Harmed.apply(found["total"], *HARM[self.day])}
        return found


def digests(engine: Engine) -> list[str]:
    """Return a digest of each rank's state: masters, moments, momentum and step counters, and the working copies."""
    optimizer, found = engine.basic_optimizer, hashlib.sha256()
    held = [tensor for master, state in optimizer.state.items() for tensor in (master, *_tensors(state))]
    held += [
        part for p in engine.module.parameters() for part in (p, getattr(p, "ds_tensor", None)) if part is not None
    ]
    for tensor in held:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (len(held), found.hexdigest()))
    return everyone


def _tensors(state: dict) -> list[torch.Tensor]:
    return [value for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]


def examine(case: dict, ranks: Ranks) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the result of each day, the state of the ranks in the end, and their state after the good days alone.

    For a case that asks for it, also return the masters before and after.
    """
    gate, config = build(case, ranks)
    tables = {f"start/{name}": w for name, w in masters(gate.engine).items()} if case.get("tables") else {}
    days = live(gate, config, case["days"], ranks)
    found = {"days": days, "held": digests(gate.engine), "state": gate.state()}
    if tables:
        return found, tables | {f"end/{name}": w for name, w in masters(gate.engine).items()}
    spared, config = build(case, ranks)
    live(spared, config, [day for day in case["days"] if day == "good"], ranks)
    return found | {"held_without": digests(spared.engine)}, {}


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: `found.json`, and the weights of cases that ask for them, go to the folder `out`."""
    allow_fp16_on_cpu()
    ranks = initialize()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        found[name], tables = examine(case, ranks)
        if ranks.is_first and tables:
            save_arrays(out / f"{name}.npz", tables)
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found))
    leave()
