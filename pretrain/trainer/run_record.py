"""The record of a run: what happens in it, as rows of metrics.jsonl and lines of the log."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Literal, TypedDict

from pretrain.checkpoints import Saved
from pretrain.config.diff import Change
from pretrain.engine.step import StepResult
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.monitor.console import memory_bytes, progress_line
from pretrain.monitor.logs import log
from pretrain.monitor.metrics import Metrics
from pretrain.monitor.rows import (
    ActivationsRow,
    BadStep,
    ChangedKey,
    CheckpointSaved,
    Ended,
    EvalRow,
    GradientClipped,
    LayerActivations,
    NotSaved,
    Number,
    Resumed,
    RolledBack,
    Started,
    TrackingChanged,
    TrainRow,
    WeightsRow,
    WeightValues,
    WentWithout,
)
from pretrain.monitor.throughput import Pace
from pretrain.monitor.tracker import TrackingEvent
from pretrain.trainer.plan import Plan
from pretrain.trainer.run_folder import RunFolder

_TRACKING = {
    "tracking_off": "tracking is off: {}. The run continues, its rows are in metrics.jsonl; tried again now and then",
    "tracking_on": "tracking is on again: {}",
}


class _Samples(TypedDict):
    first_sample: int
    last_sample: int


class RunRecord:
    """Writes down what happens in the run of `plan`. Nothing here is collective: rank 0 writes rows, each rank its log."""

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self._plan, self._folder = plan, folder
        self._metrics = Metrics(folder.path, enabled=folder.ranks.is_first)

    def started(self, step: int, changed: list[Change]) -> None:
        """Open this start of the run, after `step` steps. changed: what differs from the run that wrote the checkpoint."""
        parameters, world_size = self._plan.parameters, self._folder.ranks.world_size
        if step == 0:
            row = Started(kind="event", step=0, event="started", parameters=parameters, world_size=world_size)
            self._metrics.write(row)
            return
        resumed = Resumed(kind="event", step=step, event="resumed", parameters=parameters, world_size=world_size)
        if changed:
            resumed["changes"] = [
                ChangedKey(key=change.key, was=change.was, now=change.now, effect=change.effect) for change in changed
            ]
        self._metrics.write(resumed)

    def progress(
        self, step: int, samples: range, result: StepResult, lr: float, pace: Pace, overflowed_steps: int
    ) -> None:
        """Write one console line and one `train` row for the interval that ends at `step`.

        Args:
            samples: those of this very step.
            overflowed_steps: steps that fp16 has skipped so far.
        """
        plan = self._plan
        loss = float(result.losses[CROSS_ENTROPY])
        terms: dict[str, Number] = {
            name: float(value) for name, value in result.losses.items() if name not in ("total", CROSS_ENTROPY)
        }
        log.info(progress_line(step, plan.config.total_steps, loss, result.norm, lr, pace))
        row = TrainRow(
            kind="train",
            step=step,
            tokens=plan.config.tokens_after(step),
            **_ends_of(samples),
            epochs=plan.corpora.epochs(samples.stop),
            loss=loss,
            grad_norm=result.norm,
            lr=lr,
            tokens_per_s=pace.tokens_per_s,
            step_time_s=pace.step_time_s,
            data_wait=pace.data_wait,
            mfu=pace.mfu,
            memory_bytes=memory_bytes(),
        )
        if terms:
            row["loss_terms"] = terms
        if plan.config.optim.zclip:
            row["zclip"] = result.clip_factor
        if plan.precision == "fp16":
            row["loss_scale"], row["skipped"] = result.loss_scale, overflowed_steps
        self._metrics.write(row)

    def weights(self, step: int, measured: dict[str, WeightValues]) -> None:
        """Write the values of the weights, if any were measured."""
        if measured:
            self._metrics.write(WeightsRow(kind="weights", step=step, weights=measured))

    def evaluation(self, step: int, loss: float, average_loss: float | None) -> None:
        """Report a validation loss and its perplexity, and the loss with the average of the weights if there is one."""
        perplexity = exp(min(loss, 700.0))
        row = EvalRow(kind="eval", step=step, loss=loss, perplexity=perplexity)
        text = f"step {step:>7,}  validation loss {loss:.4f}  perplexity {perplexity:.2f}"
        if average_loss is not None:
            row["average_loss"] = average_loss
            text += f"  of the average {average_loss:.4f}"
        self._metrics.write(row)
        log.info(text)

    def activations(self, step: int, layers: list[LayerActivations]) -> None:
        """Write the activations of the layers that could be measured, if any could."""
        if layers:
            self._metrics.write(ActivationsRow(kind="activations", step=step, layers=layers))

    def saved(self, saved: Saved) -> None:
        """Report a checkpoint that is complete now."""
        self._metrics.write(
            CheckpointSaved(
                kind="event",
                step=saved.step,
                event="checkpoint_saved",
                checkpoint=str(saved.path),
                seconds=saved.seconds,
                stall_s=saved.stall_s,
            )
        )
        waited = f", training waited for {saved.stall_s:.1f} s" if self._plan.config.checkpoint.asynchronous else ""
        log.info(f"step {saved.step:>7,}  saved {saved.path} in {saved.seconds:.1f} s{waited}")

    def not_saved(self, step: int, fault: str) -> None:
        """Report that no checkpoint is written, because of the `fault` of the model."""
        log.warning(f"step {step:>7,}  not saved: {fault}")
        self._metrics.write(NotSaved(kind="event", step=step, event="not_saved", reason=fault))

    def bad_step(self, step: int, samples: range, result: StepResult, autopsy: Path | None) -> None:
        """Report a step whose verdict is a spike or not finite. autopsy: its folder, None if none was written."""
        verdict = result.verdict
        skipped = ", update skipped" if result.skipped else ""
        pointer = "" if autopsy is None else f"; see {autopsy}"
        log.warning(f"step {step:>7,}  {verdict.kind}{skipped}: {verdict.reason}{pointer}")
        self._metrics.write(
            BadStep(
                kind="event",
                step=step,
                event="spike" if verdict.kind == "spike" else "not_finite",
                reason=verdict.reason,
                skipped=result.skipped,
                **_ends_of(samples),
                autopsy=None if autopsy is None else str(autopsy),
            )
        )

    def clipped(self, step: int, samples: range, result: StepResult) -> None:
        """Write the factor by which ZClip has shortened the gradient."""
        factor, norm = result.clip_factor, result.norm
        self._metrics.write(
            GradientClipped(kind="event", step=step, event="zclip", factor=factor, grad_norm=norm, **_ends_of(samples))
        )

    def rolled_back(self, step: int, to_step: int, left_out: range, skipped: str) -> None:
        """Report the return from `step` to `to_step`.

        Args:
            left_out: the samples between.
            skipped: the clause that says which updates were skipped.
        """
        samples = _ends_of(left_out)
        self._metrics.write(RolledBack(kind="event", step=step, event="rolled_back", to_step=to_step, **samples))
        log.warning(
            f"step {step:>7,}  {skipped}: back to step {to_step:,}, on without the samples {left_out.start:,} to "
            f"{left_out.stop - 1:,}"
        )

    def went_without(self, kind: str, reason: str) -> None:
        """Write that something optional has failed, of the given kind."""
        step = self._folder.step
        self._metrics.write(WentWithout(kind="event", step=step, event="went_without", what=kind, reason=reason))

    def tracking_changed(self, event: TrackingEvent, about: str) -> None:
        """Report that tracking has stopped because of `about`, or works again at the place `about`."""
        log.warning(_TRACKING[event].format(about.rstrip(".")))
        self._metrics.write(TrackingChanged(kind="event", step=self._folder.step, event=event, reason=about))

    def ended(self, step: int, status: Literal["finished", "stopped", "preempted"], reason: str) -> None:
        """Write why the run ends."""
        self._metrics.write(Ended(kind="event", step=step, event=status, reason=reason))

    def close(self) -> None:
        """Write the rows that the disk has not taken yet."""
        self._metrics.close()


def _ends_of(samples: range) -> _Samples:
    return {"first_sample": samples.start, "last_sample": samples.stop - 1}
