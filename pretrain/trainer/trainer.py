"""A run under way: its parts, its loop over optimizer steps, and what happens between them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Literal, cast

import torch

from pretrain.autopsy import Autopsies, Recorder
from pretrain.checkpoints import Checkpoints, TrainerState
from pretrain.checkpoints.finite import fault_of_model, refuse_unless_finite
from pretrain.checkpoints.logit_probe import probe_logits, save_probe
from pretrain.checkpoints.method_state import load_method_state, save_method_state
from pretrain.checkpoints.state import layout_changes, read_matching_state, read_state
from pretrain.checkpoints.stored import is_universal, universal_counters
from pretrain.config.diff import Change
from pretrain.data.batches.batch import MicroBatch
from pretrain.data.tokenizer_files import write_files
from pretrain.distributed import signals
from pretrain.distributed.ranks import Ranks, on_every_rank
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initial_draw, initialize_weights
from pretrain.engine.step import StepResult, train_step
from pretrain.engine.step_gate import StepGate
from pretrain.engine.tensor_parallel import zero_rank
from pretrain.engine.validation import validation_loss
from pretrain.engine.weight_average import WeightAverage
from pretrain.errors import Diverged
from pretrain.files import write_text
from pretrain.model.class_logits import require_own_loss
from pretrain.model.config_json import save_config
from pretrain.monitor.activations import record_activations
from pretrain.monitor.logs import log
from pretrain.monitor.phase import enter
from pretrain.monitor.rows import WeightValues
from pretrain.monitor.throughput import Throughput, peak_flops
from pretrain.monitor.tracker import Tracker, mode_of
from pretrain.monitor.weight_monitor import WeightMonitor
from pretrain.optim.schedule import learning_rate
from pretrain.optim.zclip import ZClip
from pretrain.optional import listen, optional, prepared, together
from pretrain.resilience.consistency import check_start, check_step
from pretrain.resilience.spike_guard import SpikeGuard
from pretrain.resilience.stop_requests import StopRequest, StopRequests
from pretrain.sharded import ShardedWeights
from pretrain.sharded.stepped_tensors import AVERAGE
from pretrain.starting import start_from
from pretrain.trainer.corpora import read_again
from pretrain.trainer.plan import Plan, fixed_probe, training_batches, validation_batches
from pretrain.trainer.plan_summary import describe_plan
from pretrain.trainer.resume_changes import changes, check_length, environment_changes
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.run_record import RunRecord
from pretrain.trainer.startup_facts import facts_of_checkpoint
from pretrain.trainer.weight_table import describe_weights

FINISHED_S, STOPPED_S = 60.0, 5.0  # the time that a run waits at its end for its tracker


def train(plan: Plan, folder: RunFolder, ranks: Ranks) -> None:
    """Train what `plan` describes, from its newest checkpoint or from the start, to its last step. Collective."""
    if ranks.is_first:
        log.info(describe_plan(plan))
    requests = StopRequests(folder.path, ranks, signals.catch())
    request = requests.now()
    if request is not None and request.stop is not None:
        folder.not_started(request.stop, requested=request.requested)
        return
    Trainer(plan, folder, ranks, requests).train()


class Trainer:
    """A run under way. All methods are collective: every rank calls them in the same order.

    Attributes:
        step: optimizer steps done.
        saved: step of the newest checkpoint, None if that checkpoint does not hold the run's present place in the data.
        evaluation_due: a stop has cut short the evaluation of `step`.
        samples: the samples of the run's order that the newest step has read.
    """

    def __init__(self, plan: Plan, folder: RunFolder, ranks: Ranks, requests: StopRequests) -> None:
        """Build the model, load the checkpoint to resume from or initialize the weights, and open the data there."""
        config = plan.config
        self.plan, self.folder, self.ranks, self.requests = plan, folder, ranks, requests
        enter("building the model")
        # Dropout: the ranks of a tensor-parallel group draw the same, each of the others draws for itself.
        torch.manual_seed(config.seed * plan.zero_ranks + zero_rank(config, ranks.rank))
        self.engine = build_engine(config, plan.model_config, plan.ds_config)
        zclip = ZClip(config.optim.zclip) if config.optim.zclip else None
        self.gate = StepGate(self.engine, SpikeGuard(config.resilience.guard), zclip)
        self.weights = ShardedWeights(self.engine)
        self.recorder = Recorder(self.engine, self.weights, config.resilience.autopsy_steps)
        self.gate.watchers.append(self.recorder.gradients)
        self.average = WeightAverage(self.weights, config.methods, config.ema.decay if config.ema else None)
        self.checkpoints = Checkpoints(
            folder.path / "checkpoints", config.checkpoint, ranks, log.info, refuse_unless_finite
        )
        state, changed = self._resume() or (self._initialize(), [])
        self.gate.load_state(state.guard or {})
        for method in config.methods:
            method.prepare(self.weights)
        self.probe = on_every_rank(lambda: fixed_probe(plan)).to(ranks.device)
        on_every_rank(lambda: require_own_loss(self.engine.module, self.probe))
        folder.begin(config, state.step)
        self.step = state.step
        self.saved: int | None = state.step
        self.evaluation_due = state.evaluation_due and plan.corpora.val is not None
        self.record = RunRecord(plan, folder)
        listen(self.record.went_without)
        self.record.started(state.step, changed)
        mode = mode_of(config.log.wandb) if ranks.is_first else "disabled"
        self.tracker = Tracker(folder.path, mode, self.record.tracking_changed)
        self.loader = training_batches(plan, ranks.rank, state.samples)
        self.samples = range(state.samples, state.samples)
        self.throughput = Throughput(
            config.tokens_after, plan.flops_per_token, ranks.world_size, state.step, peak_flops(plan.precision)
        )
        self.weight_monitor = WeightMonitor(self.weights, config.log.weights_interval_steps)
        self.autopsies = Autopsies(folder.path / "autopsies", config, self.recorder, ranks, lambda: read_again(config))

    def train(self) -> None:
        """Take all steps that are left, or those before a request to stop, and end the run."""
        config, total = self.plan.config, self.plan.config.total_steps
        check_step(self.weights, config.methods, self.step, self.loader.position, lr=0.0)
        if self.evaluation_due:
            self.evaluate()
        request = StopRequest()
        while self.step < total or self.evaluation_due:
            request = self.requests.before_step(self.loader, self.step + 1)
            self.publish()
            with optional("tracking", "the tracking could not be looked after"):
                self.tracker.look()
            if request.stop:
                break
            if request.save:
                self.save()
                self.requests.saved()
            self.train_one_step()
        self.save()
        self.publish(wait=True)
        self.finish(request)

    def train_one_step(self) -> None:
        """Take the next optimizer step, let the methods act on the weights, and do what is due after it."""
        config, total = self.plan.config, self.plan.config.total_steps
        self.folder.step = self.step = step = self.step + 1
        lr = learning_rate(config.optim, step, total)
        self.weight_monitor.before_step(step)
        first, batches = self.loader.position, self.loader.next_batch()
        self.samples = range(first, self.loader.position)
        result = train_step(self.gate, step, batches, lr, self.ranks, self.plan.corpora.masked)
        enter("methods")
        self.recorder.end_step(step, self.samples, result.losses, lr, result.clip_factor)
        measured = self.weight_monitor.after_step(step)
        for method in config.methods:
            for name, values in method.after_step(step, self.weights).items():
                measured.setdefault(name, {}).update(cast(WeightValues, values))
        if not result.skipped:
            self.average.update()
        self.record.weights(step, measured)
        if due(step, config.log.interval_steps, total):
            with optional("report", "a report could not be made"):
                pace = self.throughput.lap(step, total, self.loader.wait_s)
                self.record.progress(step, self.samples, result, lr, pace, self.engine.skipped_steps)
        self.throughput.pause()
        if self._examine(result, batches):
            return
        if step % config.resilience.agreement_interval_steps == 0:
            check_step(self.weights, config.methods, step, self.samples.stop, lr)
        self._do_what_is_due()
        self.throughput.resume()

    def _do_what_is_due(self) -> None:
        """Evaluate, measure activations and save, each at its interval and at the last step."""
        config, step, total = self.plan.config, self.step, self.plan.config.total_steps
        if self.plan.corpora.val and due(step, config.eval.interval_steps, total):
            self.evaluate()
        if due(step, config.log.activations_interval_steps, total):
            self.measure_activations()
        # While updates are skipped nothing is new, and the checkpoint to roll back to must not be retired.
        if due(step, config.checkpoint.interval_steps, total) and not self.gate.guard.streak:
            self.save()

    def evaluate(self) -> None:
        """Report validation loss and perplexity. The evaluation stays due if a stop cuts it short."""
        batches = validation_batches(self.plan, self.ranks.rank)
        loss = validation_loss(self.engine, batches, self.ranks, self.requests.now)
        averaged = None
        if loss is not None and self.plan.config.ema and self.plan.config.ema.evaluate and self.average.begun:
            with self.average.in_place_of_weights():
                batches = validation_batches(self.plan, self.ranks.rank)
                averaged = validation_loss(self.engine, batches, self.ranks, self.requests.now)
            loss = None if averaged is None else loss
        self.evaluation_due = loss is None
        if loss is not None:
            self.record.evaluation(self.step, loss, averaged)

    def measure_activations(self) -> None:
        """Record the extremes of the residual stream on the fixed probe, for the layers that can be measured."""
        enter("activations")
        kind, failing = "activations", "the activations on the probe could not be measured"
        with ExitStack() as hooks:
            rows = prepared(kind, failing, lambda: hooks.enter_context(record_activations(self.engine.module)))
            if rows is None:
                return
            if together(kind, failing, lambda: probe_logits(self.engine.module, self.probe)) is None:
                return
        self.record.activations(self.step, rows)

    def save(self) -> None:
        """Save a checkpoint of this step, unless there is one, with the files that conversion needs and must prove equal.

        A model with NaN or infinity is not saved, and the log says so: no run can resume from it.
        """
        if self.saved == self.step:
            return
        self.publish(wait=True)
        enter("saving")
        plan, config, model = self.plan, self.plan.config, self.engine.module
        moments, logits = self.weights.moments(), probe_logits(model, self.probe)
        if fault := fault_of_model(self.weights, moments, logits):
            self.record.not_saved(self.step, fault)
            return

        averaged = None
        if self.average.begun:
            with self.average.in_place_of_weights():
                averaged = probe_logits(model, self.probe), self.weights.moments()

        def add_files(folder: Path) -> None:
            write_text(folder / "config.yaml", config.to_yaml())
            save_config(plan.model_config, folder / "hf")
            write_files(plan.tokenizer_files, folder / "hf")
            save_probe(folder, self.probe, logits, moments)
            if averaged is not None:
                (folder / AVERAGE).mkdir()
                save_probe(folder / AVERAGE, self.probe, *averaged)
            save_method_state(folder, config.methods, model)

        state = plan.state_at(self.step, self.loader.position)
        state = replace(state, evaluation_due=self.evaluation_due, guard=self.gate.state())
        if saved := self.checkpoints.save(self.engine, state, add_files):
            self.record.saved(saved)
        self.saved = self.step

    def publish(self, wait: bool = False) -> None:
        """Complete the checkpoint that is being written beside training, if there is one.

        Args:
            wait: wait until it is written, instead of only looking whether it is.
        """
        if wait:
            enter("saving")
        if saved := self.checkpoints.advance(wait=wait):
            self.record.saved(saved)

    def _examine(self, result: StepResult, batches: list[MicroBatch]) -> bool:
        """Record a step that was not as it should be. Returns whether the run was rolled back because of it."""
        if result.verdict.kind in ("spike", "not finite"):
            enter("autopsy")
            reason, failing = result.verdict.reason, f"the autopsy of step {self.step} failed"
            path = together("autopsy", failing, lambda: self.autopsies.write(self.engine, reason, batches))
            self.record.bad_step(self.step, self.samples, result, path)
        if 0 < result.clip_factor < 1:
            self.record.clipped(self.step, self.samples, result)
        if not self.gate.guard.must_go_back(last=self.step == self.plan.config.total_steps):
            return False
        self.roll_back()
        return True

    def roll_back(self) -> None:
        """Load the newest whole checkpoint from before the skipped steps, and continue with the data after theirs.

        The practice of PaLM (Chowdhery et al. 2022, section 5.1).

        Raises:
            Diverged: going back has not helped before, or there is no such checkpoint.
        """
        enter("rolling back")
        guard, last = self.gate.guard, self.step
        first = guard.streak_start
        assert first is not None, "there are skipped steps to go back from"
        skipped = f"the updates of steps {first:,} to {last:,} were skipped"
        if first == last:
            skipped = f"the update of step {last:,} was skipped"
        if guard.rollbacks >= guard.config.max_rollbacks:
            raise Diverged(f"{skipped}, and going back {guard.rollbacks} times has not helped")
        self.publish(wait=True)
        found = self.checkpoints.find_before(first - 1)
        if found is None:
            raise Diverged(f"{skipped}, and there is no checkpoint from before them to go back to")
        state = self._load(found)
        self.gate.rolled_back(state.guard or {})
        self.recorder.forget()
        self.folder.step = self.step = state.step
        left_out = range(state.samples, self.samples.stop)
        self.record.rolled_back(last, state.step, left_out, skipped)
        # Saved with the new place in the data, or a run that is killed now would read the bad samples again.
        self.saved = None
        self.save()
        self.throughput.restart(self.step)

    def finish(self, request: StopRequest) -> None:
        """Record why the loop ended. Every way exits with 0: launchers mask what another code would say.

        Raises:
            Diverged: all steps are done and the last one has left no model to save.
        """
        enter("ending")
        self.loader.close()
        if request.stop is None and self.saved != self.step:
            raise Diverged(f"step {self.step:,} was the last one and is not saved: NaN or infinity in the model")
        status: Literal["finished", "stopped", "preempted"] = "finished"
        reason = "all steps done"
        if request.stop is not None:
            status, reason = "stopped" if request.requested else "preempted", f"stopped by {request.stop}"
            if self.step > 0:
                saved = self.saved == self.step
                reason += " after saving" if saved else " without saving, as the model holds NaN or infinity"
        self.record.ended(self.step, status, reason)
        self.folder.status(status, reason)
        with optional("tracking", "the end of tracking has failed"):
            stopped, watchdog_s = request.stop is not None, self.plan.config.resilience.watchdog_s
            patience_s = STOPPED_S if stopped else FINISHED_S  # whoever stops a run may kill it soon
            self.tracker.close(min(patience_s, (watchdog_s or inf) / 2), linger=stopped)
        self.record.close()
        log.info(f"{status} at step {self.step:,}: {reason}. Run folder: {self.folder.path}")

    def _resume(self) -> tuple[TrainerState, list[Change]] | None:
        """Load the checkpoint that the run resumes from, and log what has changed since. None to start from scratch."""
        enter("loading the checkpoint")
        found = self.checkpoints.find()
        check_start(lambda: facts_of_checkpoint(found))
        if found is None:
            return None
        changed = on_every_rank(lambda: _compare(self.plan, found))
        state = self._load(found)
        log.info(f"resumed from {found} at step {state.step}")
        for change in changed:
            log.info(f"resumed; changed since then: {change.with_effect}")
        return state, changed

    def _load(self, found: Path) -> TrainerState:
        """Load the checkpoint `found` into engine, methods and random generators. Returns its state."""
        state = self.checkpoints.load(found, self.engine, self.plan.state_at(0, 0))
        self.average.loaded()
        on_every_rank(lambda: load_method_state(found, self.plan.config.methods, self.engine.module))
        return state

    def _initialize(self) -> TrainerState:
        """Draw or load the initial weights. Returns the state before the first step."""
        enter("initializing weights")
        plan, default_std = self.plan, self.plan.model_config.initializer_range
        if plan.start is None:
            measured = initialize_weights(self.weights, plan.config, default_std)
        else:
            rule = partial(initial_draw, config=plan.config, default_std=default_std)
            measured = start_from(plan.start, self.weights, plan.config, rule, self.ranks)
        if self.ranks.is_first:
            log.info("\n" + describe_weights(plan.weights, plan.config, default_std, plan.start, measured) + "\n")
        return plan.state_at(0, 0)


def due(step: int, interval: int, last: int) -> bool:
    """Return whether something that happens every `interval` steps, and at the last one, happens at `step`."""
    return step % interval == 0 or step == last


def _compare(plan: Plan, found: Path) -> list[Change]:
    """List what has changed since the checkpoint `found` was written. UserError if this run cannot resume from it."""
    if is_universal(found):
        step = universal_counters(found).global_steps
        check_length(found, step, plan.config)
        log.info(
            f"continuing another trainer's run after {step:,} steps: weights, optimizer states and step are its own, the data "
            "begins with this run's first sample, and methods and random numbers are those of a new run"
        )
        return []
    step, mine = read_state(found).step, plan.state_at(0, 0)
    changed = changes(found, plan.config, step)
    state = read_matching_state(found, mine, [str(change) for change in changed])
    if layout := layout_changes(state, mine):
        log.info(f"another layout than the checkpoint's: {', '.join(layout)}. Each rank reads its share of the files")
    check_length(found, step, plan.config)
    with optional("environment", "what has changed in the environment is not known"):
        changed += environment_changes(found, plan.config)
    return changed
