"""The parts of a run, put together: model, optimizer and data where the newest checkpoint left them, or at the start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints import Checkpoints, TrainerState
from pretrain.checkpoints.state import read_matching_state, read_state
from pretrain.data.batches.loader import Loader
from pretrain.distributed import Ranks, on_every_rank
from pretrain.engine import build_engine
from pretrain.finite import refuse_unless_finite
from pretrain.method_state import load_method_state
from pretrain.model import initialize_weights
from pretrain.monitor.metrics import Metrics
from pretrain.monitor.throughput import Throughput
from pretrain.monitor.tracker import Tracker, mode_of
from pretrain.optional import listen, optional
from pretrain.plan import Plan, fixed_probe, training_batches
from pretrain.resilience.agreement import check_start
from pretrain.resilience.autopsy import Recorder
from pretrain.resilience.facts import facts_of_checkpoint
from pretrain.resilience.gate import Gate
from pretrain.resilience.guard import Guard
from pretrain.resilience.orders import Orders
from pretrain.resilience.phase import enter
from pretrain.resilience.zclip import ZClip
from pretrain.resumed import Change, changes, check_length, environment_changes
from pretrain.run_folder import RunFolder, log
from pretrain.sharded import ShardedWeights
from pretrain.tensor_parallel import data_rank
from pretrain.weight_table import describe_weights


@dataclass
class Run:
    """A run under way, and where it is.

    step: optimizer steps done. saved: step of the newest checkpoint, None if it is not as it should be. evaluation_due: a
    stop has cut short the evaluation of `step`.
    """

    plan: Plan
    folder: RunFolder
    ranks: Ranks
    orders: Orders
    engine: Any
    gate: Gate
    weights: ShardedWeights
    recorder: Recorder
    checkpoints: Checkpoints
    metrics: Metrics
    tracker: Tracker
    loader: Loader
    probe: torch.Tensor
    throughput: Throughput
    step: int
    saved: int | None
    evaluation_due: bool

    @property
    def samples(self) -> range:
        """Of the run's order, those of the step that the loader has given last."""
        return range(self.loader.position - self.plan.config.data.global_batch_size, self.loader.position)


def start(plan: Plan, folder: RunFolder, ranks: Ranks, orders: Orders) -> Run:
    """Build the model, load the checkpoint to go on from or initialize the weights, and open the data there."""
    config = plan.config
    enter("building the model")
    # Dropout: every data-parallel rank draws for itself, the ranks of a tensor-parallel group alike.
    torch.manual_seed(config.seed * plan.data_ranks + data_rank(config, ranks.rank))
    engine = build_engine(plan)
    gate = Gate(engine, Guard(config.resilience.guard), config.optim.zclip and ZClip(config.optim.zclip))
    weights = ShardedWeights(engine)
    recorder = Recorder(engine, weights, config.resilience.autopsy_steps)
    gate.watchers.append(recorder.gradients)
    checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint, ranks, log.info, refuse_unless_finite)
    state, changed = _go_on(plan, engine, checkpoints) or (_begin(plan, weights), [])
    gate.load_state(state.guard or {})
    for method in config.methods:
        method.prepare(weights)
    folder.begin(config, state.step)
    metrics = Metrics(folder.path, enabled=ranks.is_first)
    listen(lambda kind, reason: metrics.event(folder.step, "went_without", what=kind, reason=reason))
    begun = "resumed" if state.step else "started"
    told = {"changes": [asdict(change) for change in changed]} if changed else {}
    metrics.event(state.step, begun, parameters=plan.parameters, world_size=ranks.world_size, **told)
    return Run(
        plan,
        folder,
        ranks,
        orders,
        engine,
        gate,
        weights,
        recorder,
        checkpoints,
        metrics,
        tracker=_track(plan, folder, metrics),
        loader=training_batches(plan, ranks.rank, state.samples),
        probe=on_every_rank(lambda: fixed_probe(plan)).to(ranks.device),
        throughput=Throughput(config.tokens_per_step, plan.flops_per_token, ranks.world_size, state.step),
        step=state.step,
        saved=state.step,
        evaluation_due=state.evaluation_due and plan.corpora.val is not None,
    )


def _track(plan: Plan, folder: RunFolder, metrics: Metrics) -> Tracker:
    """The run's tracker, which does nothing on ranks other than 0."""
    told = {
        "tracking_off": "tracking is off: {}. The run goes on, its rows are in metrics.jsonl; tried again now and then",
        "tracking_on": "tracking is on again: {}",
    }

    def tell(event: str, about: str) -> None:
        log.warning(told[event].format(about.rstrip(".")))
        metrics.event(folder.step, event, reason=about)

    mode = mode_of(plan.config.log.wandb) if folder.ranks.is_first else "disabled"
    return Tracker(folder.path, mode, tell)


def load(plan: Plan, engine, checkpoints: Checkpoints, found: Path) -> TrainerState:
    """Put engine, methods and random generators into the state that the checkpoint `found` holds, which is returned."""
    state = checkpoints.load(found, engine, plan.state_at(0, 0))
    on_every_rank(lambda: load_method_state(found, plan.config.methods, engine.module))
    return state


def _go_on(plan: Plan, engine, checkpoints: Checkpoints) -> tuple[TrainerState, list[Change]] | None:
    """Load the checkpoint that the run goes on from, and say what has changed since; None to start from scratch."""
    enter("loading the checkpoint")
    found = checkpoints.find()
    check_start(lambda: facts_of_checkpoint(found))
    if found is None:
        return None
    changed = on_every_rank(lambda: _compare(plan, found))
    state = load(plan, engine, checkpoints, found)
    log.info(f"resumed from {found} at step {state.step}")
    for change in changed:
        log.info(f"resumed; changed since then: {change.with_effect}")
    return state, changed


def _compare(plan: Plan, found: Path) -> list[Change]:
    """List what has changed since the checkpoint `found` was written. UserError if this run cannot go on from it."""
    step = read_state(found).step
    changed = changes(found, plan.config, step)
    read_matching_state(found, plan.state_at(0, 0), [str(change) for change in changed])
    check_length(found, step, plan.config)
    with optional("environment", "what has changed in the environment is not known"):
        changed += environment_changes(found)
    return changed


def _begin(plan: Plan, weights: ShardedWeights) -> TrainerState:
    """Give the weights their first values."""
    enter("initializing weights")
    default_std = plan.model_config.initializer_range
    measured = initialize_weights(weights, plan.config, default_std)
    if weights.engine.global_rank == 0:
        log.info("\n" + describe_weights(plan.weights, plan.config, default_std, measured) + "\n")
    return plan.state_at(0, 0)
