"""The autopsies of a run: `<run>/autopsies/step_00001234/` with report.md, autopsy.json and batch.txt."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from pretrain.autopsy import report_text
from pretrain.autopsy.part_figures import length, measures, update_ratio
from pretrain.autopsy.recorder import Recorder, StepFigures
from pretrain.autopsy.report_text import Content, StepEntry, WeightSeries
from pretrain.autopsy.step_samples import Batch, read_batch, sequence_losses
from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.data.batches.feed import Feed
from pretrain.distributed.ranks import Ranks
from pretrain.files import sync_folder, write_json, write_text
from pretrain.model.layout import Weight
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.optional import optional
from pretrain.sharded.engine_protocol import Engine

KEPT = 20  # autopsies of a run: one a day for three weeks
_COMPLETE = re.compile(r"step_\d{8,}(_\d+)?")


class Autopsies:
    """Writes the autopsies of a run and keeps the newest KEPT.

    A spike that lasts gets one autopsy, because steps that the last autopsy covers get none of their own.
    """

    def __init__(
        self, folder: Path, config: Config, recorder: Recorder, ranks: Ranks, read_again: Callable[[], Feed]
    ) -> None:
        """Record the run of `config`.

        Args:
            folder: the run's `autopsies`.
            read_again: opens the run's training samples a second time, beside its loader. Called on rank 0.
        """
        self.folder, self.config, self.recorder, self.ranks = folder, config, recorder, ranks
        self._read_again = read_again
        self._newest: int | None = None

    def write(self, engine: Engine, reason: str, micro_batches: Sequence[MicroBatch]) -> Path | None:
        """Write the autopsy of the newest recorded step. Collective.

        Args:
            reason: what was seen, as in the guard's verdict.
            micro_batches: those that this rank read at the step.

        Returns:
            The folder of the autopsy on rank 0, which writes it. None on other ranks, if the last autopsy covers the
            step, and if the disk does not take it, which is only logged.
        """
        now = self.recorder.newest_step
        if self._newest is not None and self._newest < now <= self._newest + self.config.resilience.autopsy_steps:
            return None
        self._newest = now
        steps = self.recorder.figures()
        losses = sequence_losses(engine, micro_batches, self.config.parallel, self.ranks)
        path = None
        if self.ranks.is_first:
            with optional("autopsy", f"the autopsy of step {now} could not be written to {self.folder}"):
                path = self._write(steps, reason, losses)
        return path

    def _write(self, steps: list[StepFigures], reason: str, losses: list[float | None]) -> Path:
        with read_batch(self._read_again(), self.config.tokenizer, steps[-1].samples, losses) as batch:
            content, text = self._content(steps, reason, batch)
            self.folder.mkdir(exist_ok=True)
            unfinished = self.folder / ".writing"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write_json(unfinished / "autopsy.json", _as_json(content))
            write_text(unfinished / "report.md", text)
            write_text(unfinished / "batch.txt", "\n\n".join(_texts(batch)) + "\n")
        path = _free_name(self.folder / f"step_{steps[-1].step:08d}")
        os.rename(unfinished, path)
        sync_folder(self.folder)
        for old in _complete(self.folder)[:-KEPT]:
            shutil.rmtree(old)
        return path

    def _content(self, steps: list[StepFigures], reason: str, batch: Batch) -> tuple[Content, str]:
        """Return the content of autopsy.json and the text of report.md."""
        layout = self.recorder.layout
        measured = measures(steps, layout)
        content: Content = {
            "step": steps[-1].step,
            "reason": reason,
            "moved": [
                *(sentence for measure in measured for sentence in report_text.sentences(measure)),
                *report_text.worst_sample(batch.samples),
            ],
            "steps": [self._step(step) for step in steps],
            "parts": {measure.name: measure.series for measure in measured},
            "weights": {name: _series(steps, weight) for name, weight in layout.items()},
            "batch": batch.samples,
        }
        worst = [batch.with_texts(sample) for sample in batch.samples[: report_text.SHOWN_SAMPLES]]
        return content, report_text.report(content, measured, worst)

    def _step(self, step: StepFigures) -> StepEntry:
        norm = length(norms.gradient for norms in step.norms.values())
        limit = self.config.optim.grad_clip
        clip = None
        if limit is None:
            clip = step.factor
        elif norm is not None:
            clip = min(1.0, limit / (norm + 1e-6)) * step.factor
        terms = {name: loss for name, loss in step.losses.items() if name not in ("total", CROSS_ENTROPY)}
        return {
            "step": step.step,
            "samples": [step.samples[0], step.samples[-1]],
            "loss": step.losses[CROSS_ENTROPY],
            "loss_terms": terms,
            "gradient_norm": norm,
            "clip": clip,
            "lr": step.lr,
            "skipped": step.factor == 0.0,
        }


def _series(steps: Sequence[StepFigures], weight: Weight) -> WeightSeries:
    """Return the figures of a weight at each step."""
    of_steps = [step.norms[weight.name] for step in steps]
    return {
        "gradient_norm": [norms.gradient for norms in of_steps],
        "update_ratio": [update_ratio([norms]) for norms in of_steps],
    }


def _texts(batch: Batch) -> Iterator[str]:
    """Yield the samples in full, the worst first, until the file would be too large."""
    left = report_text.TEXT_BYTES
    for number, sample in enumerate(batch.samples):
        if left <= 0:
            yield f"[{len(batch.samples) - number:,} more samples: tools/inspect_data.py --config ... --sample N --text]"
            return
        text = report_text.shown_safely(report_text.sample_text(batch.with_texts(sample), left))
        left -= len(text.encode())
        yield text


def _as_json(value: Any) -> Any:
    """Return `value` with strings in place of NaN and infinity, which JSON lacks: "nan" and "inf", as float() reads them."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _free_name(path: Path) -> Path:
    """Return the path, with a number if it is taken: after a rollback a run comes to the same step with other samples."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def _complete(folder: Path) -> list[Path]:
    """Return the autopsies in the folder, the oldest first."""
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))
