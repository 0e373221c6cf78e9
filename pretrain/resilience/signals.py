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
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def agreed(self, device: torch.device) -> str | None:
        """The name of a stop signal that some rank has received, the same on every rank; None to go on. Collective."""
        flag = torch.tensor(self.received, device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag)
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Data workers inherit the handler by fork; they leave stopping to their trainer."""
        if os.getpid() == self._owner:
            self.received = number
