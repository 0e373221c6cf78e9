"""What the DeepSpeed engine does for a run: one optimizer step, one validation loss, always averaged over all ranks.

What is averaged are the targets that count, of all ranks and micro-batches, each alike: which micro-batch holds how many of
them changes nothing. (The ranks of a tensor-parallel group have the same loss, so the mean over all ranks is the mean
over the batch.)
"""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch
import torch.distributed as dist

from pretrain.data.batches.batch import NO_TARGET, MicroBatch
from pretrain.distributed import Ranks
from pretrain.loss import CROSS_ENTROPY
from pretrain.model import build_model
from pretrain.optim import build_optimizer
from pretrain.plan import Plan, validation_batches


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken, or skipped because an fp16 gradient overflowed.

    losses: means over the targets of the global batch that count, float64 scalars on the device: `total`, which the step
    minimizes, and its parts, `cross_entropy` and the terms that methods add. loss_scale: what fp16 gradients were computed
    at; 1 in other precisions.
    """

    losses: dict[str, torch.Tensor]
    loss_scale: float
    skipped: bool


def build_engine(plan: Plan):
    """The DeepSpeed engine around the sharded model; its weights hold no values yet."""
    import deepspeed

    model = build_model(plan.config, plan.model_config, plan.ds_config)
    optimizer = build_optimizer(model, plan.config)
    with redirect_stdout(StringIO()):  # DeepSpeed's memory reports
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.ds_config)
    if engine.zero_optimization_stage() == 0:
        # In half precision DeepSpeed has taken a step without gradients here, which Adam would count as its first.
        engine.optimizer.state.clear()
    return engine


def train_step(engine, micro_batches: list[MicroBatch], lr: float, ranks: Ranks, masked: bool) -> Step:
    """One optimizer step at learning rate `lr` over this rank's micro-batches.

    masked: whether some targets of the run may not count; the same on every rank.
    """
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    # At stage 0 DeepSpeed divides fp16 gradients by the loss scale, but never multiplies the loss by it.
    left_to_us = loss_scale if engine.zero_optimization_stage() == 0 else 1.0
    engine.module.lm_head.gradient_scale = loss_scale
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    engine.train()
    divisor = _targets_per_micro_batch(micro_batches, ranks) if masked else None
    sums = 0.0
    for batch in micro_batches:
        losses = _losses(engine, batch.to(ranks.device), divisor)
        engine.backward(losses["total"] * left_to_us)
        engine.step()
        sums = sums + torch.stack([loss.detach().double() for loss in losses.values()])
    means = _mean_over_ranks(sums / len(micro_batches), ranks)
    return Step(dict(zip(losses, means.unbind(), strict=True)), loss_scale, skipped=not engine.was_step_applied())


def grad_norm(engine, step: Step) -> float | None:
    """The global gradient norm before clipping in `step`, the newest.

    None where DeepSpeed computes none (fp32 at ZeRO stage 0) or that of Muon's updates, and where the step was skipped.
    """
    norm = engine.get_global_grad_norm()
    if norm is None or step.skipped or _holds_updates(engine.optimizer):
        return None
    still_scaled = engine.zero_optimization_stage() == 0  # the only fp16 optimizer that leaves the scale in the norm
    return float(norm) / (step.loss_scale if still_scaled else 1.0)


def _holds_updates(optimizer) -> bool:
    """Whether Muon has turned gradients into updates before the norm is taken; the bf16 optimizer does it after."""
    uses_muon = any(group.get("use_muon") for group in optimizer.param_groups)
    return uses_muon and not hasattr(optimizer, "fp32_groups_flat_partition")


@torch.no_grad()
def validation_loss(engine, plan: Plan, ranks: Ranks) -> float:
    """The plain cross-entropy over the first batches of the validation shards, the same tokens every time."""
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # of cross-entropies, of targets that count
    for batch in validation_batches(plan, ranks.rank):
        batch = batch.to(ranks.device)
        counted = _count(batch)
        mean = _losses(engine, batch)[CROSS_ENTROPY].double()
        sums += torch.stack([mean * counted, counted.double()])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _losses(engine, batch: MicroBatch, divisor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
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
