"""Signals become a flag that all ranks look at together, so that they stop at the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 on this rank; `agreed` tells whether any rank has been signalled."""

    def __init__(self) -> None:
        self.received: int = 0
        self._owner = os.getpid()
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def agreed(self, device: torch.device) -> str | None:
        """The name of a stop signal that some rank has received, the same on every rank; None to go on. Collective.

        Call it once a step: it answers what the ranks knew at the call before, so that no step waits for the exchange.
        """
        known = torch.tensor(self.received, device=device)
        work = dist.all_reduce(known, op=dist.ReduceOp.MAX, async_op=True)
        self._asked, before = (known, work), self._asked
        if before is None:
            return None
        answer, done = before
        done.wait()
        return signal.Signals(int(answer)).name if int(answer) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Data workers inherit the handler by fork; they leave stopping to their trainer."""
        if os.getpid() == self._owner:
            self.received = number
