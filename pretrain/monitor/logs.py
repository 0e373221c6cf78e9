"""The log of a run: to its run folder and to the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pretrain.monitor.lines import LogFile

log = logging.getLogger("evenkeel")


def log_to(path: Path, console: bool) -> None:
    """Send this package's log to the file `path` and to stdout.

    Args:
        console: whether stdout gets all of it. If not, it gets errors only.
    """
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    file = LogFile(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    log.addHandler(file)
    on_console = logging.StreamHandler(sys.stdout)
    on_console.setLevel(logging.INFO if console else logging.ERROR)
    log.addHandler(on_console)
