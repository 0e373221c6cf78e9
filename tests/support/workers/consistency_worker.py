"""One rank that goes through sharded layouts, lets the ranks agree, and flips a bit here and there to see what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import initialize
from pretrain.resilience.consistency import RanksDisagree, check_step
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import forget_garbage, leave
from tests.support.workers.sharded_worker import build, run_config, step, validation_loss

LR = 1e-3


def main(cases: dict[str, dict], out: Path) -> None:
    """Write what the checks of every case said, on every rank, and leave."""
    initialize()
    allow_fp16_on_cpu()
    seen = {}
    for name, case in cases.items():
        forget_garbage()
        seen[name] = examine(case)
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, seen)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyones), encoding="utf-8")
    leave()


def examine(case: dict) -> dict[str, str]:
    """What each check said; empty where the ranks agreed."""
    config = run_config(case)
    engine, weights = build(config)
    seen = {"initial": said(weights, config)}
    for method in config.methods:
        method.prepare(weights)
    for number in range(1, 4):
        step(engine, number, LR)
        for method in config.methods:
            method.after_step(number, weights)
        seen[f"step {number}"] = said(weights, config)
    weights.rescale_(dict.fromkeys(weights.layout, (0.9, 0.01)))
    seen["rescaled"] = said(weights, config)
    validation_loss(engine)  # leaves large weights whole under ZeRO-3
    seen["evaluated"] = said(weights, config)
    last = dist.get_world_size() - 1
    faults = faults_of(engine, weights) if dist.get_rank() == last else {}
    told = [list(faults)]
    dist.broadcast_object_list(told, last)
    for what in told[0]:
        with flipped(faults.get(what)):
            seen[what] = said(weights, config)
        seen[f"{what}, mended"] = said(weights, config)
    seen["lr"] = said(weights, config, lr=LR if dist.get_rank() == 0 else LR * (1 + 1e-15))
    seen["samples"] = said(weights, config, samples=12 * dist.get_rank())
    return seen


def said(weights: ShardedWeights, config, samples: int = 36, lr: float = LR) -> str:
    try:
        check_step(weights, config.methods, 3, samples, lr)
    except RanksDisagree as error:
        return str(error)
    return ""


def faults_of(engine: Engine, weights: ShardedWeights) -> dict[str, tuple[torch.Tensor, int]]:
    """One element and which of its bits to flip, by what is hit and in which weight."""
    parameters = dict(engine.module.named_parameters())
    piece = max(weights.pieces(), key=lambda piece: piece.master.numel())
    parameter, owned = parameters[piece.name], piece.master.numel()
    partitioned = hasattr(parameter, "ds_tensor")
    working = parameter.ds_tensor.data if partitioned else parameter.data.view(-1)[piece.start :]
    found = {
        f"working copy: {piece.name}": (working[owned - 1 : owned], 0),
        f"master: {piece.name}": (piece.master[:1], 20),
    }
    if not partitioned and piece.start > 0:
        found[f"range of another rank: {piece.name}"] = (parameter.data.view(-1)[piece.start - 1 : piece.start], 0)
    norm = next(weight.name for weight in weights.layout.values() if weight.role == "norm")
    if len(whole := parameters[norm].data.view(-1)):
        found[f"whole vector: {norm}"] = (whole[5:6], 3)
    return found


@contextmanager
def flipped(place: tuple[torch.Tensor, int] | None) -> Iterator[None]:
    if place is not None:
        flip(*place)
    yield
    if place is not None:
        flip(*place)


def flip(element: torch.Tensor, bit: int) -> None:
    element.view({2: torch.int16, 4: torch.int32}[element.element_size()]).bitwise_xor_(1 << bit)
