"""The run folder: the resolved configuration, the environment, the log and the status of a run."""

from __future__ import annotations

import fcntl
import json
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from pretrain.config.schema import Config
from pretrain.credentials import masked
from pretrain.data.json_files import read_json
from pretrain.distributed.ranks import Ranks, all_gather_object, from_first_rank, on_every_rank
from pretrain.engine.compiled_blocks import form_of_blocks
from pretrain.errors import UserError
from pretrain.files import NO_LOCKS, NO_ROOM, allocated_bytes, overwrite, write_json, write_text
from pretrain.monitor.logs import log, log_to
from pretrain.optional import optional
from pretrain.trainer.environment import code_version, version_of

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """Creates the run folder and keeps its files. Collective at construction. Rank 0 writes.

    Attributes:
        step: the optimizer step that the run is at, for the status.
        begun: whether the files in the folder are of this run yet.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        """Create the folder, lock it and start the log.

        Raises:
            UserError: on every rank, if the folder cannot be written or another run is using it.
        """
        self.path, self.ranks, self.step, self.begun = path, ranks, 0, False
        on_every_rank(self._create)
        self._check_shared()
        log_to(self.path / ("log.txt" if ranks.is_first else f"logs/rank_{ranks.rank}.txt"), console=ranks.is_first)

    def begin(self, config: Config, step: int) -> None:
        """Record the configuration and the environment of the run that resumes at `step`. Nothing refuses it after this."""
        self.step, self.begun = step, True
        hosts = all_gather_object(f"{socket.gethostname()} {_known(_device_name)}")

        def record() -> None:
            with _explained(self.path):
                write_text(self.path / "config.yaml", config.to_yaml())
                with optional("environment", "environment.json could not be written"):
                    write_json(self.path / "environment.json", _environment(hosts) | {"blocks": form_of_blocks(config)})
                self.status("running")

        from_first_rank(record)

    def status(self, status: str, reason: str = "") -> None:
        """Record the status running, finished, preempted or stopped."""
        if self.ranks.is_first:
            self._write_status(status, reason)

    def not_started(self, why: str, *, requested: bool) -> None:
        """Record that this start was stopped by `why` before it began. The step of the run's status stays.

        Args:
            requested: whether a person asked for the stop.
        """
        log.info(f"not started: stopped by {why}")
        recorded = from_first_rank(self._recorded) or {}
        if recorded.get("status") not in ("finished", "stopped"):
            self.step = recorded.get("step", 0)
            self.status("stopped" if requested else "preempted", f"stopped by {why} before it had started")

    def fail(self, reason: str, exit_code: int) -> None:
        """Record a failure of this rank, if the disk still takes it.

        The status of an earlier run stays, and so does the failure of another rank, which ended the others.
        """
        with suppress(OSError, UserError):
            recorded = self._recorded()
            if recorded is None or (self.begun and recorded.get("status") != "failed"):
                self._write_status("failed", reason, exit_code=exit_code)

    def _recorded(self) -> dict[str, Any] | None:
        """Return the status in the folder, None if there is none."""
        path = self.path / "status.json"
        return read_json(path) if path.exists() else None

    def _write_status(self, status: str, reason: str, **more: int) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        record = {"status": status, "step": self.step, "reason": reason, **more, "time": now}
        _replace_status(self.path / "status.json", record)

    def _create(self) -> None:
        with _explained(self.path):
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            (self.path / "checkpoints").mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            if self.ranks.is_first:
                self._lock()
                for left in (*self.path.glob(".*.tmp"), *self.path.glob("logs/pulses/.*.tmp")):
                    left.unlink(missing_ok=True)  # left by a process that was killed while it wrote

    def _check_shared(self) -> None:
        """Raise UserError on every rank unless all see what rank 0 writes here: checkpoints are written together."""
        marker = self.path / f".shared_{from_first_rank(time.time_ns)}"
        from_first_rank(marker.touch)

        def look() -> None:
            if not marker.exists():
                raise UserError(
                    f"the run folder {self.path} on {socket.gethostname()} is not the one that rank 0 writes to. "
                    "Put 'out' on a file system that all nodes share."
                )

        try:
            on_every_rank(look)
        finally:
            if self.ranks.is_first:
                marker.unlink()

    def _lock(self) -> None:
        """Lock the folder until this process ends, so that two runs never write the same checkpoints."""
        self._lock_file = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115 (held as long as the process lives)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {self.path}. Wait for it to end, or give this one another 'name'."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to the run folder {path}: {error.strerror}.") from error


def _replace_status(path: Path, record: dict[str, Any]) -> None:
    """Write the status atomically. Without room for that, overwrite the file in place, with the reason cut to fit."""
    try:
        write_json(path, record)
    except OSError as error:
        if error.errno not in NO_ROOM or not path.exists():
            raise
        room = allocated_bytes(path)
        while len(text := json.dumps(record, indent=2) + "\n") > room and record["reason"]:
            record = record | {"reason": record["reason"][: room - len(text)]}
        overwrite(path, text)


def _environment(hosts: list[str]) -> dict[str, Any]:
    """Return the content of environment.json. hosts: host and device of each rank."""
    return {
        "python": platform.python_version(),
        "platform": _known(platform.platform),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "ranks": hosts,
        **code_version(),
        "command": [masked(word) for word in sys.argv],
    }


def _known(find: Callable[[], str]) -> str | None:
    """Return the result of `find`. If it fails, log that and return None."""
    with optional("environment", "a fact about the environment is not known"):
        return find()
    return None


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()} threads"
