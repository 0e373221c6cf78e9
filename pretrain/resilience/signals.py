"""Signals become a flag that is looked at where the run can stop; nothing else happens when they arrive.

This file imports no library, so that signals are caught before the libraries take their seconds to load.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from pretrain.resilience.launcher import ancestors

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1 on this process; processes forked from it leave stopping to it.

    ancestors: of this process, when it began.
    """

    def __init__(self) -> None:
        self.received = 0
        self.owner, self.ancestors = os.getpid(), ancestors()
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.owner:
            self.received = number


_flag: StopFlag | None = None


def catch() -> StopFlag:
    """This process's flag; from the first call on, signals that ask to stop no longer end it."""
    global _flag
    if _flag is None or _flag.owner != os.getpid():
        _flag = StopFlag()
    return _flag


def release() -> None:
    """Signals end this process again, as one of them does now if it has come already."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if _flag is not None and _flag.received:
        signal.raise_signal(_flag.received)
