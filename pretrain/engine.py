"""What the DeepSpeed engine does for a run: one optimizer step, one validation loss, always averaged over all ranks."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist

from pretrain.distributed import Ranks
from pretrain.model import build_model
from pretrain.optim import build_optimizer
from pretrain.plan import Plan, validation_batches


def build_engine(plan: Plan):
    """The DeepSpeed engine around the sharded model; its weights hold no values yet."""
    import deepspeed

    model = build_model(plan.config, plan.model_config, plan.ds_config)
    optimizer = build_optimizer(model, plan.config.optim)
    with redirect_stdout(StringIO()):  # DeepSpeed's memory reports
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.ds_config)
    return engine


def train_step(engine, micro_batches: list[torch.Tensor], lr: float, ranks: Ranks) -> torch.Tensor:
    """One optimizer step at learning rate `lr` over this rank's micro-batches, each (batch, seq_len + 1) token ids.

    Returns the loss averaged over the global batch, a float64 scalar on the device.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.train()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for tokens in micro_batches:
        tokens = tokens.to(ranks.device, non_blocking=True)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        total += loss.detach().double()
    return _mean_over_ranks(total / len(micro_batches), ranks)


def grad_norm(engine) -> float | None:
    """The global gradient norm before clipping; None where DeepSpeed computes none (ZeRO stage 0)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@torch.no_grad()
def validation_loss(engine, plan: Plan, ranks: Ranks) -> float:
    """The loss over the first batches of the validation shards, the same tokens every time."""
    engine.eval()
    losses = []
    for tokens in validation_batches(plan, ranks.rank):
        tokens = tokens.to(ranks.device, non_blocking=True)
        losses.append(engine(tokens[:, :-1], tokens[:, 1:]).double())
    return float(_mean_over_ranks(torch.stack(losses).mean(), ranks))


def _mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world_size
