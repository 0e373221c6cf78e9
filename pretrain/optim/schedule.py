"""The learning rate as a pure function of the step."""

from __future__ import annotations

from math import cos, pi
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.optim_section import OptimSection, ScheduleSection


def learning_rate(config: OptimSection, step: int, total_steps: int) -> float:
    """Return the learning rate of an optimizer step.

    It rises linearly over `warmup_steps`. Then it follows the schedule's name down to `min_lr_ratio * lr`: `cosine`,
    `linear`, `wsd` (constant, then linear over the last `decay_ratio` of all steps), or `constant`.

    Args:
        config: the run's `optim` section.
        step: the number of the step, from 1 to `total_steps`.
        total_steps: the number of steps of the run.
    """
    schedule = config.schedule
    if step <= schedule.warmup_steps:
        return config.lr * step / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * _decay(schedule, step, total_steps))


def _decay(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """Return the height between the floor (0) and the peak (1) after warmup."""
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_ratio * total_steps))
        return min(1.0, (total_steps - step) / decay_steps)
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    return 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + cos(pi * progress))
