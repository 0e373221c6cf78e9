"""Runs cases on the fake device and on the CPU, both at once, and returns their remains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakecuda.build import REPOSITORY
from tests.fakecuda.cases import RESUME_AT, Case
from tests.support import runs
from tests.support.corpus import Corpus

WORKER = "tests.fakecuda.workers.placement_worker"
DEVICES = {"cuda": ("-m", "tests.fakecuda.run", "-m", WORKER), "cpu": ("-m", WORKER)}


@dataclass(frozen=True)
class Outcome:
    """The remains of one case on one device.

    Attributes:
        folder: its run folder.
        ranks: how many ranks it had.
        runs: how many runs it had: a second one resumes the first.
    """

    folder: Path
    ranks: int
    runs: int

    @property
    def output(self) -> str:
        """Everything that the ranks printed."""
        logs = [Path(f"{self.folder}.{rank}.log") for rank in range(self.ranks)]
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())

    @property
    def finished(self) -> bool:
        """Return whether every rank of every run came to its end."""
        return self.output.count("finished\n") >= self.ranks * self.runs

    @property
    def resumed(self) -> Outcome:
        """Return the run that started from the checkpoint of this one."""
        return Outcome(self.folder.with_name(f"{self.folder.name}_resumed"), self.ranks, 1)

    def figures(self) -> dict[str, float | None]:
        """Return the losses and norms of the run, by step and name. Of a repeated step the last ones count."""
        found: dict[str, float | None] = {}
        for step, row in runs.last_rows(self.folder, "train").items():
            figures = {"loss": row["loss"], "grad_norm": row["grad_norm"], **row.get("loss_terms", {})}
            found |= {f"step {step}: {name}": value for name, value in figures.items()}
        for step, row in runs.last_rows(self.folder, "eval").items():
            found[f"step {step}: validation loss"] = row["loss"]
        return found


def run_cases(
    cases: Mapping[str, Case], ranks: int, corpus: Corpus, folder: Path, devices: tuple[str, ...] = ("cuda", "cpu")
) -> dict[str, dict[str, Outcome]]:
    """Run every case on `ranks` ranks of each device.

    Returns:
        The remains of each case, by device and case.
    """
    running = [
        process for device in devices for process in _start(cases, ranks, corpus, folder / device, DEVICES[device])
    ]
    for process in running:
        process.wait()
    return {
        device: {name: Outcome(folder / device / name, ranks, 1 + case.resumes) for name, case in cases.items()}
        for device in devices
    }


def _start(
    cases: Mapping[str, Case], ranks: int, corpus: Corpus, folder: Path, command: tuple[str, ...]
) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of one device."""
    folder.mkdir(parents=True)
    todo: dict[str, dict[str, Any]] = {
        name: {
            "config": case.content(name, corpus, folder),
            "ports": [runs.free_port() for _ in range(1 + case.resumes)],
            "resume_at": RESUME_AT if case.resumes else None,
            "plant": case.plant,
        }
        for name, case in cases.items()
    }
    file = folder / "cases.json"
    file.write_text(json.dumps(todo), encoding="utf-8")
    started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**os.environ, **runs.ENVIRONMENT, **{key: str(value) for key, value in place.items()}}
        del environment["CUDA_VISIBLE_DEVICES"]
        with (folder / f"worker.{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, str(file)],
                    cwd=REPOSITORY,
                    env=environment | {"MASTER_ADDR": "127.0.0.1"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started
