"""What the DeepSpeed engine does for a run: one optimizer step, one validation loss, always averaged over all ranks.

(The ranks of a tensor-parallel group have the same loss, so the mean over all ranks is the mean over the batch.)
"""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch
import torch.distributed as dist

from pretrain.distributed import Ranks
from pretrain.loss import CROSS_ENTROPY
from pretrain.model import build_model
from pretrain.optim import build_optimizer
from pretrain.plan import Plan, validation_batches


@dataclass(frozen=True)
class Step:
    """One optimizer step that was taken, or skipped because an fp16 gradient overflowed.

    losses: means over the global batch, float64 scalars on the device: `total`, which the step minimizes, and its parts,
    `cross_entropy` and the terms that methods add. loss_scale: what fp16 gradients were computed at; 1 in other
    precisions.
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


def train_step(engine, micro_batches: list[torch.Tensor], lr: float, ranks: Ranks) -> Step:
    """One optimizer step at learning rate `lr` over this rank's micro-batches, each (batch, seq_len + 1) token ids."""
    loss_scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    # At stage 0 DeepSpeed divides fp16 gradients by the loss scale, but never multiplies the loss by it.
    left_to_us = loss_scale if engine.zero_optimization_stage() == 0 else 1.0
    engine.module.lm_head.gradient_scale = loss_scale
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    engine.train()
    sums = 0.0
    for tokens in micro_batches:
        tokens = tokens.to(ranks.device, non_blocking=True)
        losses = engine(tokens[:, :-1], tokens[:, 1:])
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
    losses = []
    for tokens in validation_batches(plan, ranks.rank):
        tokens = tokens.to(ranks.device, non_blocking=True)
        losses.append(engine(tokens[:, :-1], tokens[:, 1:])[CROSS_ENTROPY].double())
    return float(_mean_over_ranks(torch.stack(losses).mean(), ranks))


def _mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world_size
