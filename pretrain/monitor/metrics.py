"""The run's numbers: one JSON object a line in metrics.jsonl, and the same names in wandb. Rank 0 only."""

from __future__ import annotations

import json
import math
import time
import uuid
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.files import patiently, write_text


class Metrics:
    """Appends rows to `metrics.jsonl`; a resumed run goes on in the same file, and the last row of a step counts."""

    def __init__(self, config: Config, enabled: bool) -> None:
        """With `enabled` False (ranks other than 0) every call does nothing."""
        self._file = self._wandb = None
        if not enabled:
            return
        path = config.folder / "metrics.jsonl"
        _end_last_line(path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)
        if config.log.wandb.mode != "disabled":
            self._wandb = _wandb_run(config)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row. Values are numbers, strings, or nested dicts of them; NaN and infinity become null."""
        if self._file is None:
            return
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        try:
            patiently(lambda: self._file.write(line), f"writing {self._file.name}")
        except OSError as error:
            raise UserError(
                f"cannot write to {self._file.name}: {error.strerror}. The checkpoints are intact; mend the disk and "
                "start the same command again."
            ) from error
        if self._wandb is not None and kind != "event":
            self._wandb.log({"step": step, **_flat({kind: values})})

    def event(self, step: int, event: str, **values: Any) -> None:
        """A row of kind `event`: something that happened once."""
        self.write("event", step, event=event, **values)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(config: Config) -> Any:
    """The wandb run of this run folder, the same one after a resume; its curves are drawn over `step`."""
    import wandb

    id_file = config.folder / "wandb_id"
    if not id_file.exists():
        write_text(id_file, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=config.log.wandb.project,
        name=config.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(config.folder),
        mode=config.log.wandb.mode,
        config=config.model_dump(mode="json"),
    )
    run.define_metric("*", step_metric="step")
    return run


def _end_last_line(path: Path) -> None:
    """Drop the half-written line that a killed run may have left at the end."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by slashes, as wandb groups them; the rows of a list go by their layer."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = {str(row["layer"]): row for row in value}
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float | bool):
            flat[prefix + key] = value
    return flat
