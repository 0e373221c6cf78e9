"""Turns signals into a flag that is checked where the run can stop. Until training begins, they soon end the process.

This file imports no library, so that signals are caught while libraries load.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from pretrain.distributed.launcher import ancestors
from pretrain.distributed.signal_listener import STOP_SIGNALS, SignalListener, is_ignored

PATIENCE_S = 5.0  # from a signal to the end of the process, before training begins


class StopFlag:
    """The flag that SIGTERM, SIGINT, SIGUSR1 and SIGHUP set. Processes forked from this one do not set it.

    A SIGHUP that is ignored from the start, as under `nohup`, stays ignored.

    Attributes:
        received: the number of the last signal, 0 if none has come.
        owner: this process.
        ancestors: the processes above it when it began.
    """

    def __init__(self) -> None:
        self.received = 0
        self.owner, self.ancestors = os.getpid(), ancestors()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or not is_ignored(number):
                signal.signal(number, self._note)
        self._listener = SignalListener(STOP_SIGNALS, PATIENCE_S, say_stopped)

    def heed(self) -> None:
        """Declare that the run checks the flag from now on: signals have no other effect."""
        self._listener.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.owner:
            self.received = number


_flag: StopFlag | None = None


def catch() -> StopFlag:
    """Return this process's flag. From the first call on, signals that ask to stop do not end the process at once."""
    global _flag
    if _flag is None or _flag.owner != os.getpid():
        _flag = StopFlag()
    return _flag


def release() -> None:
    """Let signals end this process again. One that has come already ends it now."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(number, signal.SIG_DFL)
    if _flag is not None:
        _flag.heed()
        if _flag.received:
            signal.raise_signal(_flag.received)


def stop_before_start(number: int, where: str = "") -> NoReturn:
    """End this process with 128 + the number of a signal that came before there was anything to save."""
    say_stopped(number, where)
    os._exit(128 + number)


def say_stopped(number: int, where: str = "") -> None:
    """Print that a signal has stopped the run before training began."""
    name = signal.Signals(number).name
    print(f"stopped by {name}{where} before training began: nothing was changed", file=sys.stderr, flush=True)
