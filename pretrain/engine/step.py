"""One optimizer step through the DeepSpeed engine.

Losses and gradients are means over the targets of the global batch that count. How these are spread over ranks and
micro-batches changes nothing. The ranks of a tensor-parallel group have the same loss, and the mean over those that share a
sequence is its loss, so the mean over all ranks is the mean over the batch.

From here to the update of the weights, in the order in which things happen:

    step.py            forward and backward of each micro-batch; the engine's step after the last one
    step_gate.py       stands in for the optimizer's step: decides whether the step is taken, and at what factor
    gradient_norm.py   the norm that the decision needs
    spike_guard.py     (in resilience/) whether loss and norm lie far above those before
    zclip.py           (in optim/) the factor by which a large gradient is shortened
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import cast

import torch
import torch.distributed as dist

from pretrain.data.batches.batch import NO_TARGET, MicroBatch
from pretrain.data.batches.on_device import on_device
from pretrain.distributed.ranks import Ranks
from pretrain.engine.step_gate import StepGate
from pretrain.model.loss import LossHead
from pretrain.monitor.phase import enter
from pretrain.resilience.spike_guard import StepVerdict
from pretrain.sharded.engine_protocol import Engine


@dataclass(frozen=True)
class StepResult:
    """One optimizer step that was taken, or left out.

    Attributes:
        losses: means over the targets of the global batch that count, float64 scalars on the device: `total`, which the
            step minimizes, and its parts, `cross_entropy` and the terms that methods add.
        loss_scale: the scale that fp16 gradients were computed at; 1 in other precisions.
        verdict: the finding of the guard, or of DeepSpeed at an fp16 overflow.
        norm: of the global gradient before clipping. None where it is not finite or DeepSpeed takes none.
        clip_factor: the factor by which ZClip shortened the gradient; 0 for a step that was left out.
    """

    losses: dict[str, torch.Tensor]
    loss_scale: float
    verdict: StepVerdict
    norm: float | None
    clip_factor: float

    @property
    def skipped(self) -> bool:
        """Return whether the step was left out."""
        return self.verdict.skip


def train_step(
    gate: StepGate, step: int, micro_batches: list[MicroBatch], lr: float, ranks: Ranks, masked: bool
) -> StepResult:
    """Take one optimizer step over this rank's micro-batches, if the gate lets it through. Collective.

    Args:
        gate: the gate of the engine.
        step: number of the step, counted from 1.
        micro_batches: this rank's share of the global batch, the same number on every rank.
        lr: the learning rate, which the parameter groups scale by their `lr_scale`.
        ranks: this rank's place among all.
        masked: whether some targets of the run may not count; the same on every rank.
    """
    engine = gate.engine
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    cast(LossHead, engine.module.lm_head).gradient_scale = loss_scale
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    engine.train()
    _accumulate_over(engine, len(micro_batches))
    divisor = _targets_per_micro_batch(micro_batches, ranks) if masked else None
    sums = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(on_device(micro_batches, ranks.device), start=1):
        enter("forward", step)
        losses = losses_of(engine, batch, divisor)
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


def _accumulate_over(engine: Engine, micro_batches: int) -> None:
    """Set the number of micro-batches that make a step.

    DeepSpeed ends a step where the number of all micro-batches so far is a multiple of it. So that number restarts at 0.
    """
    if engine.gradient_accumulation_steps() != micro_batches:
        engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        engine.micro_steps = 0


def losses_of(engine: Engine, batch: MicroBatch, divisor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the losses of one micro-batch by name; see `LossHead.forward`."""
    return engine(batch.inputs, batch.targets, divisor=divisor, position_ids=batch.positions)


def count_targets(batch: MicroBatch) -> torch.Tensor:
    """Return how many targets of the micro-batch count, an int64 scalar."""
    return (batch.targets != NO_TARGET).sum()


def _targets_per_micro_batch(micro_batches: list[MicroBatch], ranks: Ranks) -> torch.Tensor:
    """Return how many targets count in a micro-batch, on average over the global batch: float64 scalar on the device.

    DeepSpeed averages gradients over micro-batches and ranks. Sums divided by this average to the mean over all targets.
    """
    counted = torch.stack([count_targets(batch) for batch in micro_batches]).sum().double()
    if ranks.device.type == "cuda":
        counted = counted.pin_memory()  # else the host would wait for its copy
    counted = counted.to(ranks.device, non_blocking=True)
    dist.all_reduce(counted)
    return counted.clamp_min(1) / (len(micro_batches) * ranks.world_size)


def _mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world_size
