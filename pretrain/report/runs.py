"""A run folder as the report reads it: configuration, status and the metrics that still hold after every resume.

A resumed run appends to `metrics.jsonl`, so the file can hold the same steps twice. It is read as a history with
retractions: a row of step s, or an attempt that begins at step s, retracts every row after s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import yaml

from pretrain.errors import UserError
from pretrain.monitor.rows import ActivationsRow, AnyEvent, AnyRow, EvalRow, TrainRow, WeightsRow, parse_row

_BEGINNINGS = ("started", "resumed")  # the events that open an attempt: from scratch, or from a checkpoint


class RowsByKind(TypedDict):
    """The rows that hold, in the order of their steps, each step once."""

    train: list[TrainRow]
    eval: list[EvalRow]
    weights: list[WeightsRow]
    activations: list[ActivationsRow]


@dataclass(frozen=True)
class Run:
    """One run as its folder describes it.

    Attributes:
        label: The name of the run in the report, unique among the runs of a page.
        folder: The run folder.
        config: The resolved configuration.
        status: The content of `status.json`, {} if there is none.
        rows: The rows that no resume or rollback has retracted.
        events: Every event row, in the order of the file.
        wall_time_s: Seconds that the run was up, all attempts together; None if its rows hold no time.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    rows: RowsByKind
    events: list[AnyEvent]
    wall_time_s: float | None

    def series(self, kind: Literal["train", "eval"], key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the values of `key` in the rows of `kind`, both (rows,). NaN where a row lacks the value."""
        rows = self.rows[kind]
        return np.array([row["step"] for row in rows], dtype=float), np.array([number(row.get(key)) for row in rows])

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the tokens read up to each of `steps`, between the logged rows by interpolation."""
        logged, tokens = self.series("train", "tokens")
        return np.interp(steps, np.append(0.0, logged), np.append(0.0, tokens))


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read every folder. Runs that share a name are labelled by their folders.

    Raises:
        UserError: If a folder is given twice, is missing, or holds no usable run.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise UserError(f"the run folder {path} is given more than once. Name each run once.")
    names = [_name(path, _read_config(path)) for path in paths]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)
    ]


def read_run(folder: Path, label: str) -> Run:
    """Read one run folder. Raise UserError if it is missing, unreadable or has no train row yet."""
    config, status = _read_config(folder), _read_status(folder)
    path = folder / "metrics.jsonl"
    history = _read_rows(path)
    events = [row for row in history if row["kind"] == "event"]
    rows = _surviving(history)
    if not rows["train"]:
        raise UserError(
            f"{path} holds no train row, so there is nothing to draw. Wait until the run has logged its first "
            "interval, or leave this folder out."
        )
    return Run(label, folder, config, status, rows, events, _wall_time(history))


def number(value: Any) -> float:
    """Return a logged value as a float; NaN for null and for anything that is not a number."""
    return float(value) if isinstance(value, int | float) else float("nan")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}. Give the folder that holds the run's metrics.jsonl.")
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so {folder} is not a complete run folder. Give the folder that the trainer wrote "
            "(<out>/<name>), with its config.yaml and metrics.jsonl."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {found}. Restore the trainer's file.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, not the keys of a run. Restore the trainer's file.")
    return config


def _name(folder: Path, config: dict[str, Any]) -> str:
    name = str(config.get("name") or folder.resolve().name)
    return name.encode(errors="backslashreplace").decode()  # a folder's name need not be UTF-8, and the page must be


def _read_status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    try:
        status = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Restore it, or delete it to draw without it.") from None
    if not isinstance(status, dict):
        raise UserError(f"{path} holds no JSON object. Restore it, or delete it to draw without it.")
    return status


def _read_rows(path: Path) -> list[AnyRow]:
    """Return every row of the file. A last line without a newline is an interrupted write and may be broken."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run has logged nothing. Start the run, or leave it out.") from None
    rows = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(parse_row(line))
        except ValueError as error:
            if index == len(lines) - 1:
                break
            raise UserError(
                f"{path}, line {index + 1} is corrupt: {error}. Only the last line of a killed run may be cut short; "
                "restore the file, or delete this line to draw without it."
            ) from None
    return rows


def _surviving(history: list[AnyRow]) -> RowsByKind:
    """Return the rows that no later row retracts. Of two rows of one kind and step the later one counts."""
    kept: list[AnyRow] = []
    for row in history:
        is_event = row["kind"] == "event"
        if is_event and row.get("event") not in _BEGINNINGS:
            continue
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        if not is_event:
            kept.append(row)
    last = list({(row["kind"], row["step"]): row for row in kept}.values())
    return {
        "train": [row for row in last if row["kind"] == "train"],
        "eval": [row for row in last if row["kind"] == "eval"],
        "weights": [row for row in last if row["kind"] == "weights"],
        "activations": [row for row in last if row["kind"] == "activations"],
    }


def _wall_time(history: list[AnyRow]) -> float | None:
    """Return the time between consecutive rows, without the gaps in which the run was down."""
    timed = [row for row in history if isfinite(number(row.get("time")))]
    if len(timed) < 2:
        return None
    return sum(row["time"] - before["time"] for before, row in pairwise(timed) if row.get("event") not in _BEGINNINGS)
