"""Live tracking beside the run: starts the process that brings rows into wandb, and starts it again where it ends.

Training never waits for it. Rank 0 looks at it between steps, without blocking; what it does not bring to wandb is in
`metrics.jsonl`, from where it goes on, or `tools/sync_wandb.py` does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pretrain.config.schema import WandbSection
from pretrain.monitor.wandb_session import asked_mode, fault_of_mode
from pretrain.processes import own_package

START_S = 120.0  # that wandb may take to begin, imports from a slow file system included
RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0  # until the next attempt, twice as long each time
_TICK_S = 0.05

log = logging.getLogger("evenkeel")


def mode_of(section: WandbSection) -> str:
    """Return the mode of tracking: the run file's, unless the variable WANDB_MODE says otherwise of a run that is tracked."""
    if section.mode == "disabled":
        return "disabled"
    return asked_mode(section.mode)


def describe(section: WandbSection) -> str:
    """Describe how a run will be tracked, and what stands in the way, for the plan of one that is to be tracked."""
    mode = mode_of(section)
    by, fault = " (by WANDB_MODE)" * (mode != section.mode), _fault(mode)
    return f"wandb {mode}{by}, project {section.project}" + (
        f": NOTHING WILL BE TRACKED, the run itself goes on without: {fault}" if fault else ""
    )


def _fault(mode: str) -> str | None:
    """Why wandb cannot work here, as far as that can be known without a connection."""
    if fault := fault_of_mode(mode):
        return fault
    try:
        import wandb

        if mode == "offline" or wandb.login(prompt=False):
            return None
    except Exception as error:
        return f"the package wandb does not work here ({error})."
    return "there is no key for it. Log in with `wandb login`, or set WANDB_API_KEY."


class Tracker:
    """Tracks one run, from rank 0. No call raises or waits, but for `close`."""

    def __init__(self, folder: Path, mode: str, tell: Callable[..., None]) -> None:
        """folder: the run's. mode: online, offline or disabled, which does nothing.

        tell: called with `tracking_off` and the reason when tracking stops to work, and `tracking_on` when it does again.
        """
        self._folder, self._mode, self._tell = folder.absolute(), mode, tell
        self._process: subprocess.Popen | None = None
        self._heard = b""
        self._works: bool | None = None  # what has been said last
        self._pause_s, self._again = RETRY_S, 0.0
        if mode != "disabled":
            self._start()

    def look(self) -> None:
        """Hear how tracking does; begin again where it is time to."""
        if self._mode == "disabled":
            return
        if self._process is None:
            if time.monotonic() >= self._again:
                self._start()
            return
        ended = self._process.poll() is not None
        self._listen()
        if ended and self._process is not None:
            self._give_up(f"its process ended with code {self._process.returncode}")
        elif not self._works and self._process is not None and time.monotonic() - self._began > START_S:
            self._give_up(f"wandb has not begun within {START_S:.0f} s")

    def close(self, patience_s: float, *, linger: bool = False) -> None:
        """Let wandb have the rest of the rows, and wait for it up to `patience_s`; then it is ended, or with `linger` left.

        linger: it takes no longer than LINGER_S then.
        """
        if self._process is not None:
            self._process.stdin.close()
            deadline = time.monotonic() + patience_s
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(_TICK_S)
            self._listen()
        if self._process is not None:
            if self._process.poll() is None and not linger:
                self._give_up(f"wandb has not taken all rows within {patience_s:.0f} s")
            elif self._process.poll():
                self._give_up(f"its process ended with code {self._process.returncode}")
        if self._works is False:
            log.warning(f"not all rows are in wandb; to bring them there: python tools/sync_wandb.py {self._folder}")
        self._mode = "disabled"

    def _start(self) -> None:
        command = [sys.executable, "-m", "pretrain.monitor.wandb_session", str(self._folder), self._mode]
        self._began, self._heard = time.monotonic(), b""
        try:
            with open(self._folder / "logs/wandb.txt", "a", encoding="utf-8") as said:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env={**os.environ, **own_package(), "WANDB__STATS_PID": str(os.getpid())},
                    start_new_session=True,  # Ctrl-C is for the trainer
                )
            os.set_blocking(self._process.stdout.fileno(), False)
        except OSError as error:
            self._give_up(f"its process cannot be started: {error}")

    def _listen(self) -> None:
        """Take in what the process has said: a JSON object a line."""
        self._heard += self._process.stdout.read() or b""
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "off" in message:
                self._give_up(message["off"])
                return
            self._tell_that_it_works(message["on"])

    def _tell_that_it_works(self, place: str) -> None:
        if self._works is False:
            self._tell("tracking_on", place)
        else:
            log.info(f"tracked by wandb: {place}")
        self._works = True

    def _give_up(self, reason: str) -> None:
        """Until the next attempt. Said when it worked before, or was to."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                stream.close()
            self._process = None
        if self._works and time.monotonic() - self._began > LONGEST_RETRY_S:
            self._pause_s = RETRY_S
        self._again = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
        if self._works is not False:
            self._works = False
            self._tell("tracking_off", reason)
