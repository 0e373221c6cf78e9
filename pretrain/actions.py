"""What a run does beside its steps: report, evaluate, save, look into a bad step, go back, end. All collective."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from math import exp, inf
from pathlib import Path

from pretrain.checkpoints import Saved
from pretrain.config_json import save_config
from pretrain.data.batches.batch import MicroBatch
from pretrain.data.tokenizer_files import write_files
from pretrain.engine import Step, validation_loss
from pretrain.errors import Diverged
from pretrain.files import write_text
from pretrain.finite import fault_of_model
from pretrain.loss import CROSS_ENTROPY
from pretrain.method_state import save_method_state
from pretrain.monitor.activations import record_activations
from pretrain.monitor.console import memory_bytes, progress_line
from pretrain.monitor.throughput import Pace
from pretrain.optional import optional, prepared, together
from pretrain.probe import probe_logits, save_probe
from pretrain.resilience.autopsy import Autopsies
from pretrain.resilience.orders import Order
from pretrain.resilience.phase import enter
from pretrain.run import Run, load
from pretrain.run_folder import log

FINISHED_S, STOPPED_S = 60.0, 5.0  # that a run waits at its end for its tracker


def report(run: Run, done: Step, lr: float, pace: Pace) -> None:
    """One console line and one `train` row for the interval that ends at this step.

    `first_sample` and `last_sample` are those of this very step, `epochs` how often each source has been read. `loss`
    is the plain cross-entropy; `loss_terms` holds what methods add to it. fp16 adds the loss scale of this step, and how
    many steps have been skipped so far because a gradient overflowed.
    """
    plan = run.plan
    terms = {name: float(value) for name, value in done.losses.items() if name != "total"}
    loss = terms.pop(CROSS_ENTROPY)
    log.info(progress_line(run.step, plan.config.total_steps, loss, done.norm, lr, pace))
    added = {"loss_terms": terms} if terms else {}
    clipped = {"zclip": done.clip_factor} if plan.config.optim.zclip else {}
    scaling = {"loss_scale": done.loss_scale, "skipped": run.engine.skipped_steps} if plan.precision == "fp16" else {}
    run.metrics.write(
        "train",
        run.step,
        tokens=run.step * plan.config.tokens_per_step,
        first_sample=run.samples.start,
        last_sample=run.samples.stop - 1,
        epochs=plan.corpora.epochs(run.samples.stop),
        loss=loss,
        grad_norm=done.norm,
        lr=lr,
        tokens_per_s=pace.tokens_per_s,
        step_time_s=pace.step_time_s,
        data_wait=pace.data_wait,
        mfu=pace.mfu,
        memory_bytes=memory_bytes(),
        **added,
        **clipped,
        **scaling,
    )


def evaluate(run: Run) -> None:
    """Validation loss and perplexity, on the console and as an `eval` row; due again where a stop cuts it short."""
    loss = validation_loss(run.engine, run.plan, run.ranks, run.orders.now)
    run.evaluation_due = loss is None
    if loss is None:
        return
    perplexity = exp(min(loss, 700.0))
    run.metrics.write("eval", run.step, loss=loss, perplexity=perplexity)
    log.info(f"step {run.step:>7,}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")


def look_at_activations(run: Run) -> None:
    """An `activations` row: the extremes of the residual stream on the fixed probe, of the layers where that works."""
    enter("activations")
    kind, failing = "activations", "the activations on the probe could not be measured"
    with ExitStack() as hooks:
        rows = prepared(kind, failing, lambda: hooks.enter_context(record_activations(run.engine.module)))
        if rows is None:
            return
        if together(kind, failing, lambda: probe_logits(run.engine.module, run.probe)) is None:
            return
    if rows:
        run.metrics.write("activations", run.step, layers=rows)


def save(run: Run) -> None:
    """A checkpoint of this step, unless there is one: with what conversion needs and must prove equal.

    None of a model with NaN or infinity, which the log says: there is nothing to go on from.
    """
    if run.saved == run.step:
        return
    publish(run, wait=True)
    enter("saving")
    plan, config, model = run.plan, run.plan.config, run.engine.module
    moments, logits = run.weights.moments(), probe_logits(model, run.probe)
    if fault := fault_of_model(run.weights, moments, logits):
        log.warning(f"step {run.step:>7,}  not saved: {fault}")
        run.metrics.event(run.step, "not_saved", reason=fault)
        return

    def add_files(folder: Path) -> None:
        write_text(folder / "config.yaml", config.to_yaml())
        save_config(plan.model_config, folder / "hf")
        write_files(plan.tokenizer_files, folder / "hf")
        save_probe(folder, run.probe, logits, moments)
        save_method_state(folder, config.methods, model)

    state = plan.state_at(run.step, run.loader.position)
    state = replace(state, evaluation_due=run.evaluation_due, guard=run.gate.state())
    _tell(run, run.checkpoints.save(run.engine, state, add_files))
    run.saved = run.step


def publish(run: Run, wait: bool = False) -> None:
    """Complete the checkpoint that is written while training goes on, if there is one: once it is written, or `wait`."""
    if wait:
        enter("saving")
    _tell(run, run.checkpoints.advance(wait=wait))


def _tell(run: Run, saved: Saved | None) -> None:
    if saved is not None:
        times = {"seconds": saved.seconds, "stall_s": saved.stall_s}
        run.metrics.event(saved.step, "checkpoint_saved", checkpoint=str(saved.path), **times)
        waited = f", training waited for {saved.stall_s:.1f} s" if run.plan.config.checkpoint.asynchronous else ""
        log.info(f"step {saved.step:>7,}  saved {saved.path} in {saved.seconds:.1f} s{waited}")


def examine(run: Run, done: Step, autopsies: Autopsies, batches: list[MicroBatch]) -> None:
    """Say that a step was not as it should be, and look into it."""
    enter("autopsy")
    found = done.verdict
    failing = f"the autopsy of step {run.step} failed"
    path = together("autopsy", failing, lambda: autopsies.write(run.engine, found.reason, batches))
    log.warning(
        f"step {run.step:>7,}  {found.kind}{', update skipped' * done.skipped}: {found.reason}"
        + f"; see {path}" * (path is not None)
    )
    run.metrics.event(
        run.step,
        found.kind.replace(" ", "_"),
        reason=found.reason,
        skipped=done.skipped,
        first_sample=run.samples.start,
        last_sample=run.samples.stop - 1,
        autopsy=path and str(path),
    )


def note_clipping(run: Run, done: Step) -> None:
    """A `zclip` event: by which factor the gradient of this step was shortened as an outlier."""
    samples = {"first_sample": run.samples.start, "last_sample": run.samples.stop - 1}
    run.metrics.event(run.step, "zclip", factor=done.clip_factor, grad_norm=done.norm, **samples)


def roll_back(run: Run) -> None:
    """Go back to the newest whole checkpoint from before the skipped steps, and on with the data after theirs.

    The practice of PaLM (Chowdhery et al. 2022, section 5.1). Raises Diverged where it has not helped before.
    """
    enter("rolling back")
    guard, first, last = run.gate.guard, run.gate.guard.streak_start, run.step
    skipped = f"the updates of steps {first:,} to {last:,} were skipped"
    if first == last:
        skipped = f"the update of step {last:,} was skipped"
    if guard.rollbacks >= guard.config.max_rollbacks:
        raise Diverged(f"{skipped}, and going back {guard.rollbacks} times has not helped")
    publish(run, wait=True)
    found = run.checkpoints.find_before(first - 1)
    if found is None:
        raise Diverged(f"{skipped}, and there is no checkpoint from before them to go back to")
    state = load(run.plan, run.engine, run.checkpoints, found)
    run.gate.rolled_back(state.guard or {})
    run.recorder.forget()
    run.folder.step = run.step = state.step
    left_out = range(state.samples, run.samples.stop)
    run.metrics.event(
        last, "rolled_back", to_step=state.step, first_sample=left_out.start, last_sample=left_out.stop - 1
    )
    log.warning(
        f"step {last:>7,}  {skipped}: back to step {state.step:,}, on without the samples {left_out.start:,} to "
        f"{left_out.stop - 1:,}"
    )
    run.saved = None  # with the new place in the data, or a run that is killed now would read the bad samples again
    save(run)
    run.throughput.restart(run.step)


def finish(run: Run, order: Order) -> None:
    """Record why the loop ended. Every way exits with 0: launchers mask what another code would say.

    Raises Diverged if all steps are done and the last one has left no model to save.
    """
    enter("ending")
    run.loader.close()
    if order.stop is None and run.saved != run.step:
        raise Diverged(f"step {run.step:,} was the last one and is not saved: NaN or infinity in the model")
    if order.stop is None:
        status, reason = "finished", "all steps done"
    else:
        status = "stopped" if order.requested else "preempted"
        saving = "after saving" if run.saved == run.step else "without saving, as the model holds NaN or infinity"
        reason = f"stopped by {order.stop}" + f" {saving}" * (run.step > 0)
    run.metrics.event(run.step, status, reason=reason)
    run.folder.status(status, reason)
    with optional("tracking", "the end of tracking has failed"):
        stopped, watchdog_s = order.stop is not None, run.plan.config.resilience.watchdog_s
        patience_s = STOPPED_S if stopped else FINISHED_S  # whoever stops a run may kill it soon
        run.tracker.close(min(patience_s, (watchdog_s or inf) / 2), linger=stopped)
    run.metrics.close()
    log.info(f"{status} at step {run.step:,}: {reason}. Run folder: {run.folder.path}")
