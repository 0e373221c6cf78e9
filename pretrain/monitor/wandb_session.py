"""The process that sends the rows of a run to wandb, so that nothing that wandb does or waits for reaches training.

    python -m pretrain.monitor.wandb_session RUN_FOLDER MODE      # started by pretrain/monitor/tracker.py

`metrics.jsonl` is the record of the run, and wandb follows it. Rows other than events are numbered, and row n is wandb's
step n. So wandb's own count says what it has. Rows that the server or the offline files of the run folder hold are not
sent again. Imports no torch, to start in the time that wandb takes.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, cast

import yaml

from pretrain import startup
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.monitor.rows import AnyRow, parse_row
from pretrain.monitor.wandb_files import steps_in_files

INIT_S = 30  # the time that wandb may take to begin
POLL_S = 2.0
LINGER_S = 60  # the time for the remaining rows once the trainer is gone
_LONGEST_REASON = 300  # characters
_MODES = {"run": "online", "dryrun": "offline"}  # wandb's older names
_EVENT = b'{"kind": "event"'
# wandb reads its settings from the environment, and ignores those that its version does not have.
_SETTINGS = {"WANDB_CONSOLE": "off", "WANDB_INIT_TIMEOUT": str(INIT_S), "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "2"}


def asked_mode(otherwise: str) -> str:
    """Return the mode in the variable WANDB_MODE, under its present name, or `otherwise` if it is not set."""
    asked = os.environ.get("WANDB_MODE") or otherwise
    return _MODES.get(asked, asked)


def fault_of_mode(mode: str) -> str | None:
    """Return why nothing can be tracked in this mode, which only the variable can have set. None if it can."""
    return None if mode in ("online", "offline") else f"WANDB_MODE is '{mode}': only online and offline track a run."


def reason_of(error: BaseException) -> str:
    """Return the message of an error on one line. pydantic, with which wandb checks its variables, takes several lines."""
    return shorten(str(error).rstrip("."), _LONGEST_REASON, placeholder=" ...") or type(error).__name__


class NumberedRows:
    """The rows of `metrics.jsonl` except events, numbered from 0 in the order of the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self.count = path, 0, 0

    def new(self, first: int) -> Iterator[tuple[int, AnyRow]]:
        """Yield the whole rows that no earlier call has passed, from number `first` on."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if line.startswith(_EVENT):
                    continue
                number, self.count = self.count, self.count + 1
                if number >= first:
                    yield number, parse_row(line)


class Session:
    """The wandb run of a run folder. Every start of the run continues it: its id is in the file `wandb_id`.

    Attributes:
        first: number of the first row that wandb does not have.
        place: where the run is tracked: a URL, or a folder of offline files.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        """Start wandb, which takes up to INIT_S seconds.

        Args:
            folder: the run folder.
            mode: online or offline.

        Raises:
            UserError: the mode is another one.
            BaseException: whatever wandb raises.
        """
        if fault := fault_of_mode(mode):
            raise UserError(fault)
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import wandb

        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:12])
        run_id = id_file.read_text(encoding="utf-8").strip()
        self._rows = NumberedRows(folder / "metrics.jsonl")
        self._run = wandb.init(
            project=config["log"]["wandb"]["project"],
            name=config["name"],
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=cast(Literal["online", "offline"], mode),
            config=config,
        )
        self._run.define_metric("*", step_metric="step")
        self.first = self._run.starting_step if mode == "online" else steps_in_files(folder, run_id)
        self.place = self._run.url if mode == "online" else Path(self._run.dir).parent

    def send(self) -> int:
        """Log the rows that wandb does not have yet. Returns how many."""
        sent = 0
        for number, row in self._rows.new(self.first):
            self._run.log(values_of(row), step=number, commit=True)
            sent += 1
        return sent

    def finish(self, exit_code: int = 0) -> None:
        """Wait until wandb has stored all rows. exit_code: that of the run."""
        self._run.finish(exit_code=exit_code)


def values_of(row: AnyRow) -> dict[str, Any]:
    """Return what wandb gets of a row: numbers under names that begin with the row's kind, such as `train/loss`."""
    values = {key: value for key, value in row.items() if key not in ("kind", "step", "time")}
    if row["kind"] == "weights":
        values = {**row["weights"]}  # `weights/<name>/std`, without a second `weights`
    return {"step": row["step"], "_timestamp": row["time"], **flat({row["kind"]: values})}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under names joined by slashes, as wandb groups them. Items of a list go by their layer."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(row["layer"]): row for row in value}
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float | bool):
            found[prefix + key] = value
    return found


@contextmanager
def alone(folder: Path, patience_s: float) -> Iterator[None]:
    """Keep other processes from sending the rows of this run folder. UserError if one does so for `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    with open(folder / ".wandb_lock", "w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process brings {folder} into wandb right now: wait for it.") from None
                time.sleep(0.2)
        yield


def follow(folder: Path, mode: str, say: Callable[..., None]) -> None:
    """Send each row as it comes, until the trainer closes stdin or is gone. Then send the rest, within LINGER_S.

    Args:
        say: called with `on` and the place once tracking works.
    """
    with alone(folder, LINGER_S):
        session = Session(folder, mode)
        say(on=str(session.place))
        while not select.select([sys.stdin], [], [], POLL_S)[0]:
            session.send()
        threading.Timer(LINGER_S, os._exit, [1]).start()
        session.send()
        session.finish(_exit_code(folder))


def _exit_code(folder: Path) -> int:
    """Return the exit code of the run from its status."""
    return json.loads((folder / "status.json").read_text(encoding="utf-8")).get("exit_code", 0)


def main() -> None:
    """Track the run, and report on stdout, one JSON object a line, that tracking works (`on`) or why not (`off`)."""
    startup.begin()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # stdin says when to end: the trainer closes it, or is gone
    channel = os.dup(1)
    os.dup2(2, 1)

    def say(**message: str) -> None:
        with suppress(BrokenPipeError):  # the trainer may be gone
            os.write(channel, json.dumps(message).encode() + b"\n")

    try:
        follow(Path(sys.argv[1]), sys.argv[2], say)
    except BaseException as error:  # wandb also raises SystemExit
        say(off=reason_of(error))
        os._exit(1)
    os._exit(0)  # at exit wandb would wait for a server that may be away


if __name__ == "__main__":
    main()
