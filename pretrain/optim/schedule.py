"""The learning rate as a pure function of the step."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.schema import OptimSection, ScheduleSection


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
