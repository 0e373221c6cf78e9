"""Runs the stages one after another, each in a process with a limit, and writes what they find as they find it."""

from __future__ import annotations

import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pretrain.gpu_check.speed import CASES
from pretrain.processes import own_package

RESULTS = "results.jsonl"
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Step:
    """A stage to run.

    Attributes:
        name: of its lines.
        run: module:function in this package.
        limit_s: seconds that it may take.
        arguments: of the function, besides the stage.
        on_the_cpu: whether it sees no GPU.
    """

    name: str
    run: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    on_the_cpu: bool = False


def steps(quick: bool) -> list[Step]:
    """Return the stages, the most important first. A quick check measures all speeds in one process."""
    names = [case.name for case in CASES]
    speeds = [names] if quick else [[name] for name in names]
    patience = 10 if quick else 1  # the shapes are tiny, and the machine may be slow
    return [
        Step("reference on the CPU", "correctness:on_the_cpu", 60 * patience, on_the_cpu=True),
        Step("GPU against CPU", "correctness:equals_the_cpu", 90 * patience),
        Step("TVR against float64", "correctness:tvr_exact", 60 * patience),
        Step("DeepSpeed files", "correctness:every_ds_config", 90 * patience),
        Step("waits of the host", "correctness:waits_of_the_host", 60 * patience),
        Step("same bits", "correctness:repeated", 60 * patience, {"deterministic": True}),
        Step("same bits", "correctness:repeated", 60 * patience, {"deterministic": False}),
        Step("documents apart", "correctness:documents_apart", 60 * patience),
        Step("conversion", "correctness:conversion", 60 * patience),
        *(Step("speed", "speed:measured", 150 * patience, {"names": group}) for group in speeds[:5]),
        Step("profile", "speed:profiled", 90 * patience),
        *(Step("speed", "speed:measured", 150 * patience, {"names": group}) for group in speeds[5:]),
    ]


class Worker:
    """The process of a stage. It loads its libraries from construction on, and begins at `order`."""

    def __init__(self, step: Step, folder: Path, number: int, python: list[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS} | own_package()
        if step.on_the_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
            python = [sys.executable]
        self.step, self.log = step, folder / f"logs/{number:02d}_{step.run.partition(':')[2]}.txt"
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*python, "-m", "pretrain.gpu_check.worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                start_new_session=True,
            )

    def results(self, folder: Path, quick: bool, limit_s: float) -> Iterator[dict[str, Any]]:
        """Begin, and yield what the stage finds as it finds it; at last how it has ended, if that was not well."""
        order = {"run": self.step.run, "arguments": self.step.arguments, "folder": str(folder), "quick": quick}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # its exit code says why
            stdin.write(json.dumps(order) + "\n")
            stdin.close()
        deadline = time.monotonic() + limit_s
        for line in _lines_until(stdout, deadline):
            yield json.loads(line)
        if time.monotonic() >= deadline:
            self.end()
            yield {"case": "", "passed": False, "note": f"took longer than {limit_s:.0f} s; its log: {self.log}"}
        elif code := self._process.wait():
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing"]
            yield {"case": "", "passed": False, "note": f"ended with code {code}: {last[0][:300]}; its log: {self.log}"}

    def end(self) -> None:
        """Kill the process and those that it has started, if it has not ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_steps(folder: Path, planned: list[Step], quick: bool, python: str, minutes: float) -> Iterator[dict[str, Any]]:
    """Yield what each stage finds, and append it to results.jsonl in `folder`.

    Args:
        folder: of the check, with the material.
        planned: the stages, in order.
        quick: whether everything is tiny.
        python: the words that start Python for each stage.
        minutes: that all stages may take. Those that are left then are reported as not run.
    """
    began = time.monotonic()
    worker: Worker | None = None
    waiting: Worker | None = None
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        try:
            for number, step in enumerate(planned):
                left = 60 * minutes - (time.monotonic() - began)
                worker = waiting or Worker(step, folder, number, shlex.split(python))
                following = planned[number + 1 : number + 2]
                waiting = Worker(following[0], folder, number + 1, shlex.split(python)) if following else None
                if left < 1:
                    worker.end()
                    found = iter([{"case": _names(step), "passed": None, "note": "not run: no time was left"}])
                else:
                    found = worker.results(folder, quick, min(step.limit_s, left))
                for result in found:
                    line = {"stage": step.name, "seconds": round(time.monotonic() - began, 1), **result}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    yield line
        finally:
            for unfinished in (worker, waiting):
                if unfinished is not None:
                    unfinished.end()


def _names(step: Step) -> str:
    return ", ".join(step.arguments.get("names", ()))


def _lines_until(stream: IO[str], deadline: float) -> Iterator[str]:
    """Yield the lines of a pipe until its end or the deadline."""
    os.set_blocking(stream.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            content = os.read(stream.fileno(), 1 << 16)
            if not content:
                return
            *lines, rest = (rest + content).split(b"\n")
            yield from (line.decode() for line in lines)
