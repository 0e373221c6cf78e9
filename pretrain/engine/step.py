"""What the DeepSpeed engine does for a run: one optimizer step, one validation loss, always averaged over all ranks.

What is averaged are the targets that count, of all ranks and micro-batches, each alike: which micro-batch holds how many of
them changes nothing. (The ranks of a tensor-parallel group have the same loss, so the mean over all ranks is the mean
over the batch.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from pretrain.config.schema import Config
from pretrain.data.batches.batch import NO_TARGET, MicroBatch
from pretrain.distributed.ranks import Ranks
from pretrain.engine.build_model import build_model
from pretrain.engine.step_gate import StepGate
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.monitor.phase import enter
from pretrain.optim.param_groups import build_optimizer
from pretrain.resilience.spike_guard import StepVerdict
from pretrain.sharded.engine_protocol import Engine


@dataclass(frozen=True)
class StepResult:
    """One optimizer step that was taken, or left out.

    losses: means over the targets of the global batch that count, float64 scalars on the device: `total`, which the step
    minimizes, and its parts, `cross_entropy` and the terms that methods add. loss_scale: what fp16 gradients were computed
    at; 1 in other precisions. verdict: what the guard, or DeepSpeed at an fp16 overflow, found it to be. norm: of the
    global gradient before clipping, None where it is not finite or DeepSpeed takes none. clip_factor: what ZClip shortened
    the gradient by.
    """

    losses: dict[str, torch.Tensor]
    loss_scale: float
    verdict: StepVerdict
    norm: float | None
    clip_factor: float

    @property
    def skipped(self) -> bool:
        return self.verdict.skip


def build_engine(config: Config, model_config: PreTrainedConfig, ds_config: dict[str, Any]) -> Engine:
    """Return the DeepSpeed engine around the sharded model. Its weights hold no values yet."""
    import deepspeed

    model = build_model(config, model_config, ds_config)
    optimizer = build_optimizer(model, config)
    with redirect_stdout(StringIO()):  # DeepSpeed's memory reports
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if engine.zero_optimization_stage() == 0:
        # In half precision DeepSpeed has taken a step without gradients here, which Adam would count as its first.
        engine.optimizer.state.clear()
    return engine


def train_step(
    gate: StepGate, step: int, micro_batches: list[MicroBatch], lr: float, ranks: Ranks, masked: bool
) -> StepResult:
    """Optimizer step number `step` at learning rate `lr` over this rank's micro-batches, if the gate lets it through.

    masked: whether some targets of the run may not count; the same on every rank.
    """
    engine = gate.engine
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    engine.module.lm_head.gradient_scale = loss_scale
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    engine.train()
    divisor = _targets_per_micro_batch(micro_batches, ranks) if masked else None
    sums = 0.0
    for number, batch in enumerate(micro_batches, start=1):
        enter("forward", step)
        losses = _losses(engine, batch.to(ranks.device), divisor)
        enter("backward")
        # At stage 0 DeepSpeed divides fp16 gradients by the loss scale, but never multiplies the loss by it.
        engine.backward(losses["total"] * (loss_scale if engine.zero_optimization_stage() == 0 else 1.0))
        sums = sums + torch.stack([loss.detach().double() for loss in losses.values()])
        if number == len(micro_batches):
            enter("optimizer")
            means = dict(zip(losses, _mean_over_ranks(sums / number, ranks).unbind(), strict=True))
            gate.expect(step, means["total"], loss_scale)
        engine.step()
    decision = gate.passed()
    norm = decision.norm if decision.norm != inf else None
    return StepResult(means, loss_scale, decision.verdict, norm, decision.factor)


@torch.no_grad()
def validation_loss(
    engine: Engine, batches: Iterable[MicroBatch], ranks: Ranks, stopped: Callable[[], object]
) -> float | None:
    """The plain cross-entropy over this rank's `batches`, averaged over all ranks. Collective.

    None where `stopped`, asked before each batch, says so on all ranks.
    """
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of cross-entropies, of targets that count
    for batch in batches:
        if stopped():
            return None
        enter("evaluation")
        batch = batch.to(ranks.device)
        counted = _count(batch)
        mean = _losses(engine, batch)[CROSS_ENTROPY].double()
        sums += torch.stack([mean * counted, counted.double()])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _losses(engine: Engine, batch: MicroBatch, divisor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return engine(batch.inputs, batch.targets, divisor=divisor, position_ids=batch.positions)


def _targets_per_micro_batch(micro_batches: list[MicroBatch], ranks: Ranks) -> torch.Tensor:
    """How many targets count in a micro-batch on average over all of the global batch, a float64 scalar on the device.

    DeepSpeed averages gradients over micro-batches and ranks; sums divided by this average to the mean over all targets.
    """
    counted = sum(_count(batch) for batch in micro_batches).to(ranks.device, torch.float64)
    dist.all_reduce(counted)
    return counted.clamp_min(1) / (len(micro_batches) * ranks.world_size)


def _count(batch: MicroBatch) -> torch.Tensor:
    """How many targets count, an int64 scalar."""
    return (batch.targets != NO_TARGET).sum()


def _mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world_size
