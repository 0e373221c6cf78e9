"""Tiny real runs for the tests: start, signal and kill them, and read their results.

`launch` runs a whole command as a user types it. `start_ranks` starts the processes that such a command would start,
forked from a server that has the libraries loaded already, so that a run on two ranks costs seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pretrain import processes
from pretrain.monitor.rows import AnyRow

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = "pretrain/train.py"
PATIENCE_S = 240  # a loaded machine is slow; a run that takes longer hangs

# One thread a rank, loopback only, no GPU: two ranks could not share one.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_SILENT": "true",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_WAITS = re.compile(r"rank \d+ of \d+ waits at ")

_ports = itertools.count(random.SystemRandom().randrange(10_000))

_server = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """Start the process that has the libraries loaded, from which ranks are forked."""
    processes.start_fork_server(["pretrain.train", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"])


@dataclass(frozen=True)
class Ended:
    """The result of a command or a set of ranks: exit codes in rank order, and everything they printed."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        """The one exit code that all processes share."""
        assert len(set(self.codes)) == 1, f"exit codes {self.codes}\n{self.stdout}\n{self.stderr}"
        return self.codes[0]


@dataclass
class Job:
    """Running ranks."""

    processes: list
    logs: list[tuple[Path, Path]]
    pids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.pids = [process.pid for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                os.kill(process.pid, number)

    def wait(self) -> Ended:
        """Wait for the end of every rank. The ranks of a run that hangs are killed, and their code is -9."""
        deadline = time.monotonic() + PATIENCE_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        out, err = (
            "".join(path.read_text() for path in paths if path.exists()) for paths in zip(*self.logs, strict=True)
        )
        return Ended([process.exitcode for process in self.processes], out, err)


def arguments(run_file: Path, settings: dict | None = None, *flags: str) -> list[str]:
    """Return the command line after `train.py`."""
    overrides = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["--config", str(run_file), *overrides, *flags]


@contextmanager
def start_ranks(
    words: list[str],
    logs: Path,
    ranks: int = 2,
    limits: dict | None = None,
    prepare: Callable[[], None] | None = None,
    only: Collection[int] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[Job]:
    """Start processes of `train.py` with the variables that torchrun would set, and kill them at the end of the context.

    Args:
        words: The command line after `train.py`.
        logs: The folder of their output.
        ranks: How many ranks the run has.
        limits: Resource limits (`resource.RLIMIT_*` to a number) of each process.
        prepare: Called in each process before `train.py`; a function of a module that it can import.
        only: The ranks that are started; None for all.
        variables: Added to torchrun's, or in their place. An empty one counts as none.
    """
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    attempt = len(list(logs.glob("*.0.out")))
    paths = [(logs / f"{attempt}.{rank}.out", logs / f"{attempt}.{rank}.err") for rank in range(ranks)]
    processes = []
    paths = [path for rank, path in enumerate(paths) if only is None or rank in only]
    for rank, (out, err) in zip(only or range(ranks), paths, strict=True):
        place: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = ENVIRONMENT | {key: str(value) for key, value in place.items()} | (variables or {})
        processes.append(
            _server.Process(target=_be_rank, args=(words, environment, str(out), str(err), limits or {}, prepare))
        )
        processes[-1].start()
    job = Job(processes, paths)
    try:
        yield job
    finally:
        job.signal(signal.SIGKILL)
        for process in processes:
            process.join()


def run_ranks(
    words: list[str],
    logs: Path,
    ranks: int = 2,
    limits: dict | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """Start ranks and wait for their end."""
    with start_ranks(words, logs, ranks, limits, prepare) as job:
        return job.wait()


def run_together(commands: dict[str, tuple[list[str], int]], logs: Path) -> dict[str, Ended]:
    """Run several (words, ranks) at once, each as `run_ranks`: refused runs spend their time waiting."""
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(start_ranks(words, logs / name, ranks))
            for name, (words, ranks) in commands.items()
        }
        return {name: job.wait() for name, job in jobs.items()}


def assert_refused(ended: Ended, *parts: str) -> None:
    """Assert exit code 2 on every rank, and one paragraph on stderr, printed once, that holds `parts`.

    Messages of ranks that wait for others are ignored: ranks are slow to start on a loaded machine.
    """
    message = "".join(line for line in ended.stderr.splitlines(keepends=True) if not _WAITS.match(line))
    assert ended.code == 2
    assert message.count("error: ") == 1
    assert message.startswith("error: ")
    assert "Traceback" not in ended.stdout + ended.stderr
    for part in parts:
        assert part in message


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed take fp16 on the CPU, which it refuses although torch can do it, slowly. For `prepare`."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.half]


def _be_rank(
    words: list[str],
    environment: dict[str, str],
    out: str,
    err: str,
    limits: dict,
    prepare: Callable[[], None] | None,
) -> None:
    import resource

    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.environ.update(environment)
    sys.argv = [TRAIN, *words]
    if prepare is not None:
        prepare()
    from pretrain.train import main

    main()
    sys.stdout.flush()


def launch(command: list[str], variables: dict[str, str] | None = None) -> Ended:
    """Run `command` in the repository as a shell would, and wait. A command that hangs is killed with its children."""
    return wait_for([open_process(command, variables)])


def open_process(command: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen:
    inherited = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=inherited | ENVIRONMENT | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(processes: list[subprocess.Popen]) -> Ended:
    """Wait for processes of `open_process`. Each leads its own session, which is killed if it hangs."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=PATIENCE_S))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outputs.append(process.communicate())
    out, err = ("".join(texts) for texts in zip(*outputs, strict=True))
    return Ended([process.returncode for process in processes], out, err)


def deepspeed(words: list[str]) -> list[subprocess.Popen]:
    """Start `train.py` on two ranks under the deepspeed launcher."""
    return [open_process(["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN, *words])]


def torchrun(words: list[str]) -> list[subprocess.Popen]:
    """Start `train.py` on two ranks under torchrun."""
    return [open_process(["torchrun", "--standalone", "--nproc-per-node", "2", TRAIN, *words])]


def free_port(first: int = 10_000, last: int = 19_999) -> int:
    """Return a free port on the loopback within first..last; each call starts after the one before.

    The defaults lie below the ports that systems hand out themselves, which may be taken between this call and their use.
    """
    for _ in range(first, last + 1):
        port = first + (next(_ports) % (last + 1 - first))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {first}..{last}")


def rows(folder: Path, kind: str) -> list[dict]:
    """Return the rows of one kind in metrics.jsonl, in the order of the file. Every row of the file must fit its type."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [checked_row(json.loads(line)) for line in lines if line.endswith("\n")]
    return [row for row in found if row["kind"] == kind]


def checked_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl. ValidationError unless it has the fields of one of the types, and no others."""
    _row_types().validate_python(row, strict=True, extra="forbid")
    return row


@cache
def _row_types() -> TypeAdapter[AnyRow]:
    return TypeAdapter(AnyRow)


def last_rows(folder: Path, kind: str) -> dict[int, dict]:
    """Return the row that counts for each step: the last."""
    return {row["step"]: row for row in rows(folder, kind)}


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss by step."""
    return {step: row["loss"] for step, row in last_rows(folder, "train").items()}


def events(folder: Path, name: str) -> list[dict]:
    return [row for row in rows(folder, "event") if row["event"] == name]


def status(folder: Path) -> dict:
    """Return status.json without the time, {} if there is none."""
    path = folder / "status.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in found.items() if key != "time"}


def wait_until(condition: Callable[[], bool], job: Job, patience_s: float = PATIENCE_S) -> None:
    """Poll until `condition` holds. Fail if the job ends first, or after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert job.running, f"the run ended before what was waited for: {job.wait()}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a run folder but the logs and the lock: a refused run must not change them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {str(path.relative_to(folder)): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in relative.items()
        if name not in ("log.txt", ".lock") and not name.startswith("logs/")
    }
