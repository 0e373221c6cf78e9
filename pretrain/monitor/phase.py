"""The phase of work that this rank is in, so that a run that hangs can say where."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MIRROR_BYTES = 256


@dataclass(frozen=True)
class Phase:
    """One stretch of work.

    Attributes:
        step: the optimizer step that it belongs to.
        number: how many phases this rank has entered.
        began: its start, in seconds of the monotonic clock.
    """

    name: str = "starting"
    step: int = 0
    number: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """The time that it has taken so far."""
        return time.monotonic() - self.began


_current = Phase()
_mirror: int | None = None


def enter(name: str, step: int | None = None) -> None:
    """Begin the phase `name` of optimizer step `step`, by default the step of the phase before."""
    global _current
    _current = Phase(name, _current.step if step is None else step, _current.number + 1)
    _reflect()


def current() -> Phase:
    """Return the phase that this rank is in."""
    return _current


def mirror(path: Path) -> None:
    """Keep the phase in a file from now on. The file remains if this process is killed."""
    global _mirror
    _mirror = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    _reflect()


def read_mirror(path: Path) -> str:
    """Return the phase in another rank's file, as "'forward' of step 7". Empty if there is no file."""
    return path.read_bytes().rstrip(b"\0").decode(errors="replace") if path.exists() else ""


def _reflect() -> None:
    if _mirror is None:
        return
    with suppress(OSError):
        text = f"'{_current.name}' of step {_current.step}".encode()
        os.pwrite(_mirror, text[:_MIRROR_BYTES].ljust(_MIRROR_BYTES, b"\0"), 0)
