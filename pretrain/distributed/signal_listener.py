"""Hears signals whatever the main thread does.

Python runs its signal handlers in the main thread, between two of its own instructions: a call into C++ that does not
return (a store that does not answer, a collective, the training of a tokenizer) makes a process deaf. The system, though,
writes the number of a signal into a pipe at once (`signal.set_wakeup_fd`), which a thread reads here.

This file imports no library: it is in place before they load.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Ear:
    """Ends this process with 128 + a signal's number, `patience_s` after it, unless `close` comes first.

    Processes that are forked from this one do not share it.
    """

    def __init__(self, numbers: Collection[int], patience_s: float, farewell: Callable[[int], None]) -> None:
        """farewell: called with the signal's number, in the ear's own thread, before the process ends."""
        self._numbers, self._patience_s, self._farewell = numbers, patience_s, farewell
        self._closed = threading.Event()
        self._heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_deafen)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Leave the signals to their handlers from now on. For the main thread."""
        if not self._closed.is_set():
            self._closed.set()
            signal.set_wakeup_fd(-1)

    def _listen(self) -> None:
        while (number := os.read(self._heard, 1)[0]) not in self._numbers:
            pass
        if not self._closed.wait(self._patience_s):
            try:
                self._farewell(number)
            finally:
                os._exit(128 + number)


def is_ignored(number: int) -> bool:
    """Whether this process was started so that the signal does nothing to it, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


def _deafen() -> None:
    signal.set_wakeup_fd(-1)
