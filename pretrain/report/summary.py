"""The main figures of a run in words, each with its exact value beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np

from pretrain.report.runs import Run, number
from pretrain.report.units import compact, duration

UNKNOWN = "–"


@dataclass(frozen=True)
class RunFigure:
    """One figure of the summary.

    Attributes:
        label: Its name.
        text: The form in which it is shown.
        exact: The number in full, shown on hovering; "" if `text` is exact.
    """

    label: str
    text: str
    exact: str = ""


def figures(run: Run) -> list[RunFigure]:
    """Return the figures of `run`, the same labels in the same order for every run."""
    train = run.rows["train"][-1]
    evaluation: Mapping[str, object] = run.rows["eval"][-1] if run.rows["eval"] else {}
    _, rates = run.series("train", "tokens_per_s")
    rate = float(np.nanmedian(rates)) if np.isfinite(rates).any() else float("nan")
    return [
        RunFigure("steps", _steps(train["step"], _planned(run.config)), str(train["step"])),
        RunFigure("tokens", compact(train["tokens"]), str(train["tokens"])),
        _loss("train loss", train, "loss", "{:,.4f}"),
        _loss("validation loss", evaluation, "loss", "{:,.4f}"),
        _loss("perplexity", evaluation, "perplexity", "{:,.2f}"),
        RunFigure("tokens/s", compact(rate) if isfinite(rate) else UNKNOWN, f"median over the run: {rate}"),
        RunFigure(
            "wall time", UNKNOWN if run.wall_time_s is None else duration(run.wall_time_s), f"{run.wall_time_s} s"
        ),
    ]


def status_line(run: Run) -> str:
    """Return the state of the run: running, finished, preempted or failed, with step and reason if they say more."""
    status = run.status.get("status", "status unknown")
    if status == "finished":
        return status
    step = f" at step {run.status['step']:,}" if isinstance(run.status.get("step"), int) else ""
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    return f"{status}{step}{reason}"


def model_line(run: Run) -> str:
    """Return the model and its batch in one line, as far as the configuration has them."""
    model, data = run.config.get("model") or {}, run.config.get("data") or {}
    parts: list[tuple[Any, str]] = [
        (model.get("family"), "{}"),
        (model.get("num_hidden_layers"), "{} layers" if model.get("num_hidden_layers") != 1 else "{} layer"),
        (model.get("hidden_size"), "hidden {:,}"),
        (_batch(data.get("global_batch_size")), "{} sequences a step"),
        (data.get("seq_len"), "{:,} tokens a sequence"),
    ]
    return ", ".join(form.format(value) for value, form in parts if value is not None)


def _batch(given: Any) -> str | None:
    """Return the sequences of a step in words, None where the configuration does not say them."""
    if isinstance(given, dict):
        return f"{given['start']:,} to {given['end']:,}"
    return None if given is None else f"{given:,}"


def method_lines(run: Run) -> list[str]:
    """Return a line for each method of the run with its options; for a plain run, one that says so."""
    return [_method_line(method) for method in run.config.get("methods") or []] or ["no stability method"]


def resumed_at(run: Run) -> list[int]:
    """Return the steps that the run was resumed from, in order."""
    return [event["step"] for event in run.events if event.get("event") == "resumed"]


def _planned(config: dict[str, Any]) -> int | None:
    """Return the steps of the whole run, configured as steps or as tokens."""
    if config.get("tokens"):
        batch = config["data"]["global_batch_size"]
        if isinstance(batch, dict):
            return None  # a batch that grows: the number follows from the ramp, which this page does not compute
        return ceil(config["tokens"] / (batch * config["data"]["seq_len"]))
    return config.get("steps")


def _steps(done: int, planned: Any) -> str:
    return f"{done:,} of {planned:,}" if isinstance(planned, int) and planned != done else f"{done:,}"


def _loss(label: str, row: Mapping[str, object], key: str, form: str) -> RunFigure:
    if key not in row:
        return RunFigure(label, UNKNOWN, "not logged")
    value = number(row[key])  # the trainer writes null for a loss that is not finite
    return RunFigure(label, form.format(value) if isfinite(value) else "not finite", str(value))


def _method_line(method: dict[str, Any]) -> str:
    options = [_option(key.replace("_", " "), value) for key, value in method.items() if key != "name" and value]
    name = str(method.get("name", "unnamed")).upper()
    return f"{name}: {', '.join(options)}" if options else name


def _option(key: str, value: Any) -> str:
    if value is True:
        return key
    if isinstance(value, list):
        return f"{key} {'/'.join(map(str, value))}"
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
