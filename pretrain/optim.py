"""The optimizer's parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

import torch

from pretrain.layout import describe_model

if TYPE_CHECKING:
    from pretrain.config import OptimSection, ScheduleSection


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and the rest (norms, biases), which do not.

    Chosen by the layout: under ZeRO-3 a parameter's own `ndim` is that of a placeholder.
    """
    parameters = dict(model.named_parameters())
    matrices, vectors = [], []
    for weight in describe_model(model):
        (matrices if len(weight.shape) == 2 else vectors).append(parameters[weight.name])
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, config: OptimSection) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; DeepSpeed then swaps in its shards of the parameters.

    torch's own optimizer, fused on GPUs: DeepSpeed's CPU Adam needs a C++ compiler and gains nothing here.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=torch.cuda.is_available() or None,
    )


def learning_rate(config: OptimSection, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` in 1..total_steps.

    Linear warmup over `warmup_steps`, then by the schedule's name down to `min_lr_ratio * lr`: `cosine`, `linear`,
    `wsd` (constant, then linear over the last `decay_ratio` of all steps), `constant`.
    """
    schedule = config.schedule
    if step <= schedule.warmup_steps:
        return config.lr * step / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * _decay(schedule, step, total_steps))


def _decay(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """The share of the way from the floor to the peak that is left after warmup, in 0..1."""
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_ratio * total_steps))
        return min(1.0, (total_steps - step) / decay_steps)
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    return 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + cos(pi * progress))
