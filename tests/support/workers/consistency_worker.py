"""A rank that builds sharded layouts, checks that the ranks agree, and flips single bits to see the check fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.config.schema import Config
from pretrain.distributed.ranks import initialize
from pretrain.resilience.consistency import RanksDisagree, check_step
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import forget_garbage, leave
from tests.support.workers.sharded_worker import build, run_config, step, validation_loss

LR = 1e-3


def main(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: the results of the checks of every case, on every rank, go to `out`."""
    initialize()
    allow_fp16_on_cpu()
    seen = {}
    for name, case in cases.items():
        forget_garbage()
        seen[name] = examine(case)
    gathered_checks: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered_checks, seen)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered_checks), encoding="utf-8")
    leave()


def examine(case: dict) -> dict[str, str]:
    """Return the message of each check; empty where the ranks agreed."""
    config = run_config(case)
    engine, weights = build(config)
    seen = {"initial": check(weights, config)}
    for method in config.methods:
        method.prepare(weights)
    for number in range(1, 4):
        step(engine, number, LR)
        for method in config.methods:
            method.after_step(number, weights)
        seen[f"step {number}"] = check(weights, config)
    weights.rescale_(dict.fromkeys(weights.layout, (0.9, 0.01)))
    seen["rescaled"] = check(weights, config)
    validation_loss(engine)  # leaves large weights whole under ZeRO-3
    seen["evaluated"] = check(weights, config)
    last = dist.get_world_size() - 1
    faults = faults_of(engine, weights) if dist.get_rank() == last else {}
    names = [list(faults)]
    dist.broadcast_object_list(names, last)
    for name in names[0]:
        with flipped(faults.get(name)):
            seen[name] = check(weights, config)
        seen[f"{name}, mended"] = check(weights, config)
    seen["lr"] = check(weights, config, lr=LR if dist.get_rank() == 0 else LR * (1 + 1e-15))
    seen["samples"] = check(weights, config, samples=12 * dist.get_rank())
    return seen


def check(weights: ShardedWeights, config: Config, samples: int = 36, lr: float = LR) -> str:
    try:
        check_step(weights, config.methods, 3, samples, lr)
    except RanksDisagree as error:
        return str(error)
    return ""


def faults_of(engine: Engine, weights: ShardedWeights) -> dict[str, tuple[torch.Tensor, int]]:
    """Return one element and which of its bits to flip, by the copy and the weight that it hits."""
    parameters = dict(engine.module.named_parameters())
    piece = max(weights.pieces(), key=lambda piece: piece.master.numel())
    parameter, owned = parameters[piece.name], piece.master.numel()
    partition = getattr(parameter, "ds_tensor", None)
    working = parameter.data.view(-1)[piece.start :] if partition is None else partition.data
    found = {
        f"working copy: {piece.name}": (working[owned - 1 : owned], 0),
        f"master: {piece.name}": (piece.master[:1], 20),
    }
    if partition is None and piece.start > 0:
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
