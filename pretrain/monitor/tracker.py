"""Live tracking beside the run: the process that sends rows to wandb is started, and started again when it ends.

Training never waits for it. Rank 0 looks at it between steps, without blocking. Rows that it has not sent are in
`metrics.jsonl`, from which its next start or `tools/sync_wandb.py` continues.
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
from typing import IO, Literal, TypeAlias

from pretrain.config.schema import WandbSection
from pretrain.monitor.wandb_session import asked_mode, fault_of_mode
from pretrain.processes import own_package

START_S = 120.0  # the time that wandb may take to begin, imports from a slow file system included
RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0  # the first and the longest pause before an attempt; each is twice the last
_TICK_S = 0.05

log = logging.getLogger("evenkeel")

TrackingEvent: TypeAlias = Literal["tracking_off", "tracking_on"]


def mode_of(section: WandbSection) -> str:
    """Return the mode of tracking: that of the run file, or for a tracked run that of the variable WANDB_MODE."""
    if section.mode == "disabled":
        return "disabled"
    return asked_mode(section.mode)


def describe(section: WandbSection) -> str:
    """Describe how a run will be tracked, and what stands in the way of it."""
    mode = mode_of(section)
    described = f"wandb {mode}, project {section.project}"
    if mode != section.mode:
        described = f"wandb {mode} (by WANDB_MODE), project {section.project}"
    if fault := _fault(mode):
        described += f": NOTHING WILL BE TRACKED, the run itself goes on without: {fault}"
    return described


def _fault(mode: str) -> str | None:
    """Return why wandb cannot work here, as far as that can be known without a connection. None if it can."""
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
    """Tracks one run, from rank 0. No call raises, and only `close` waits."""

    def __init__(self, folder: Path, mode: str, announce: Callable[[TrackingEvent, str], object]) -> None:
        """Start to track the run in `folder`.

        Args:
            mode: online or offline, or disabled to do nothing.
            announce: called with `tracking_off` and the reason when tracking stops to work, and with `tracking_on` and
                the place when it works again.
        """
        self._folder, self._mode, self._announce = folder.absolute(), mode, announce
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""  # the start of a line whose rest has not come yet
        self._works: bool | None = None  # as last announced
        self._pause_s, self._again = RETRY_S, 0.0
        if mode != "disabled":
            self._start()

    def look(self) -> None:
        """Take in what the process reports, and start it again when it is time to."""
        if self._mode == "disabled":
            return
        if self._process is None:
            if time.monotonic() >= self._again:
                self._start()
            return
        ended = self._process.poll() is not None
        self._listen(self._process)
        if ended and self._process is not None:
            self._give_up(f"its process ended with code {self._process.returncode}")
        elif not self._works and self._process is not None and time.monotonic() - self._began > START_S:
            self._give_up(f"wandb has not begun within {START_S:.0f} s")

    def close(self, patience_s: float, *, linger: bool = False) -> None:
        """Let the process send the remaining rows, and wait for it up to `patience_s` seconds.

        Args:
            linger: leave a process that takes longer to itself, which ends it within LINGER_S. If not, it is killed.
        """
        if self._process is not None:
            _pipe(self._process.stdin).close()
            deadline = time.monotonic() + patience_s
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(_TICK_S)
            self._listen(self._process)
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
            with open(self._folder / "logs/wandb.txt", "a", encoding="utf-8") as messages:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    env={**os.environ, **own_package(), "WANDB__STATS_PID": str(os.getpid())},
                    start_new_session=True,  # Ctrl-C is for the trainer
                )
            os.set_blocking(_pipe(self._process.stdout).fileno(), False)
        except OSError as error:
            self._give_up(f"its process cannot be started: {error}")

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Take in what the process has written: a JSON object a line."""
        self._heard += _pipe(process.stdout).read() or b""
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "off" in message:
                self._give_up(message["off"])
                return
            self._announce_success(message["on"])

    def _announce_success(self, place: str) -> None:
        if self._works is False:
            self._announce("tracking_on", place)
        else:
            log.info(f"tracked by wandb: {place}")
        self._works = True

    def _give_up(self, reason: str) -> None:
        """End the process until the next attempt. Announced unless the attempt before has failed too."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                _pipe(stream).close()
            self._process = None
        if self._works and time.monotonic() - self._began > LONGEST_RETRY_S:
            self._pause_s = RETRY_S
        self._again = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
        if self._works is not False:
            self._works = False
            self._announce("tracking_off", reason)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """Return a stream of a process that was started with pipes."""
    assert stream is not None
    return stream
