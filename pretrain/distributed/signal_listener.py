"""Receives signals while the main thread is in a library.

Python runs its signal handlers in the main thread, between two of its own instructions. A call into C++ that does not
return (a store that does not answer, a collective, the training of a tokenizer) blocks them. But the number of a signal is
written into a pipe at once (`signal.set_wakeup_fd`), which a thread reads here.

This file imports no library, so that it works before libraries load.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class SignalListener:
    """Ends this process with 128 + a signal's number, `patience_s` after the signal, unless `close` is called first.

    Processes that are forked from this one do not share it.
    """

    def __init__(self, numbers: Collection[int], patience_s: float, farewell: Callable[[int], None]) -> None:
        """Start to listen.

        Args:
            numbers: the signals to listen for.
            patience_s: seconds from a signal to the end of the process.
            farewell: called with the signal's number, in the listener's thread, before the process ends.
        """
        self._numbers, self._patience_s, self._farewell = numbers, patience_s, farewell
        self._closed = threading.Event()
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_stop_listening)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Leave the signals to their handlers from now on. Call it in the main thread."""
        if not self._closed.is_set():
            self._closed.set()
            signal.set_wakeup_fd(-1)

    def _listen(self) -> None:
        while (number := os.read(self._read_end, 1)[0]) not in self._numbers:
            pass
        if not self._closed.wait(self._patience_s):
            try:
                self._farewell(number)
            finally:
                os._exit(128 + number)


def is_ignored(number: int) -> bool:
    """Return whether this process was started to ignore the signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


def _stop_listening() -> None:
    signal.set_wakeup_fd(-1)
