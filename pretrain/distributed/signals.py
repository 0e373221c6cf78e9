"""Signals become a flag that is looked at where the run can stop; until training begins, they end the process soon.

This file imports no library, so that signals are caught before the libraries take their seconds to load.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from pretrain.distributed.launcher import ancestors
from pretrain.distributed.signal_listener import STOP_SIGNALS, Ear, is_ignored

PATIENCE_S = 5.0  # with which a signal is left to the run's own order of things before there is anything to lose


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGHUP on this process; processes forked from it leave stopping to it.

    A SIGHUP that is ignored from the start, as under `nohup`, stays so. ancestors: of this process, when it began.
    """

    def __init__(self) -> None:
        self.received = 0
        self.owner, self.ancestors = os.getpid(), ancestors()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or not is_ignored(number):
                signal.signal(number, self._note)
        self._ear = Ear(STOP_SIGNALS, PATIENCE_S, say_stopped)

    def heed(self) -> None:
        """Declare that the run looks at the flag from now on: nothing else happens when signals arrive."""
        self._ear.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.owner:
            self.received = number


_flag: StopFlag | None = None


def catch() -> StopFlag:
    """This process's flag; from the first call on, signals that ask to stop no longer end it at once."""
    global _flag
    if _flag is None or _flag.owner != os.getpid():
        _flag = StopFlag()
    return _flag


def release() -> None:
    """Signals end this process again, as one of them does now if it has come already."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(number, signal.SIG_DFL)
    if _flag is not None:
        _flag.heed()
        if _flag.received:
            signal.raise_signal(_flag.received)


def stop_before_start(number: int, where: str = "") -> NoReturn:
    """End this process by a signal that came before there was anything to save, with 128 + its number."""
    say_stopped(number, where)
    os._exit(128 + number)


def say_stopped(number: int, where: str = "") -> None:
    name = signal.Signals(number).name
    print(f"stopped by {name}{where} before training began: nothing was changed", file=sys.stderr, flush=True)
