"""Faults inside a rank, at a chosen place: functions for `prepare` of tests/support/runs.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pretrain.config.optim_section import OptimSection


def at_phase(
    name: str, step: int, rank: int, action: Callable[[], None], after: str | None = None
) -> Callable[[], None]:
    """Call `action` when `rank` first enters the phase `name` at `step` or later, after it has been in phase `after`."""
    return partial(_strike, name, step, rank, action, after)


def send(*numbers: signal.Signals) -> Callable[[], None]:
    """Send signals to the rank itself, one after another."""
    return partial(_send, numbers)


def replace(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Put `function` in the place of an attribute of a module or class, for the rest of the process."""
    setattr(owner, name, function)


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def storage_that_hangs(rank: int, after: int) -> Callable[[], None]:
    """Let the reads of samples on `rank` hang after the first `after` ones."""
    return partial(_hang_reads, rank, after)


def gpu_that_hangs(rank: int, step: int) -> Callable[[], None]:
    """Let the gate of `rank` wait for ever for the norm of `step`, within the call that reads it: so a GPU's hang is seen."""
    return partial(_hang_norm, rank, step)


def _strike(name: str, step: int, rank: int, action: Callable[[], None], after: str | None) -> None:
    from pretrain.monitor import phase

    if int(os.environ["RANK"]) != rank:
        return
    reflect, struck = phase._reflect, threading.Event()
    been: set[str | None] = {None}

    def reflect_and_strike() -> None:
        reflect()
        now = phase.current()
        been.add(now.name)
        if now.name == name and now.step >= step and after in been and not struck.is_set():
            struck.set()
            action()

    replace(phase, "_reflect", reflect_and_strike)


def _send(numbers: tuple[signal.Signals, ...]) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def _hang_reads(rank: int, after: int) -> None:
    from pretrain.data.batches.feed import Feed

    if int(os.environ["RANK"]) != rank:
        return
    read, calls = Feed.read, [0]

    def read_or_hang(self: Feed, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            sleep_for_ever()
        read(self, *arguments)

    replace(Feed, "read", read_or_hang)


def _hang_norm(rank: int, step: int) -> None:
    from pretrain.engine.gradient_norm import GradientNorm
    from pretrain.monitor import phase

    if int(os.environ["RANK"]) != rank:
        return
    measured = GradientNorm.measured

    class Unready:
        __float__ = partial(time.sleep, 1000)  # without a frame of Python, as the reading of a GPU's tensor

    def measured_or_unready(self: GradientNorm, loss_scale: float) -> Any:
        return Unready() if phase.current().step >= step else measured(self, loss_scale)

    replace(GradientNorm, "measured", measured_or_unready)


def bad_batches(first_sample: int, last_sample: int, factor: float) -> Callable[[], None]:
    """Multiply the loss of every step that reads one of these samples of the run's order by `factor`."""
    return partial(_spoil, range(first_sample, last_sample + 1), factor)


def together(*faults: Callable[[], None]) -> Callable[[], None]:
    return partial(_all, faults)


def _spoil(samples: range, factor: float) -> None:
    import torch

    from pretrain.data.batches.loader import Loader
    from pretrain.engine import step as engine

    next_batch, losses, read = Loader.next_batch, engine.losses_of, [range(0)]

    def next_batch_and_note(self: Loader) -> list:
        before = self.position
        batches = next_batch(self)
        read[0] = range(before, self.position)
        return batches

    def spoiled(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        found = losses(*arguments, **named)
        spoil = torch.is_grad_enabled() and not set(samples).isdisjoint(read[0])
        return {name: loss * factor for name, loss in found.items()} if spoil else found

    replace(Loader, "next_batch", next_batch_and_note)
    replace(engine, "losses_of", spoiled)


def _all(faults: tuple[Callable[[], None], ...]) -> None:
    for fault in faults:
        fault()


def infinite_rate(first_step: int) -> Callable[[], None]:
    """Make the learning rate infinite from `first_step` on: one update makes every weight NaN or infinite."""
    return partial(_raise_rate, first_step)


def _raise_rate(first_step: int) -> None:
    from pretrain.trainer import trainer

    learning_rate = trainer.learning_rate

    def raised(config: OptimSection, step: int, total: int) -> float:
        return float("inf") if step >= first_step else learning_rate(config, step, total)

    replace(trainer, "learning_rate", raised)
