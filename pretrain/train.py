"""One pretraining run, top to bottom.

    deepspeed pretrain/train.py --config configs/1b_tvr.yaml [--set key=value ...] [--dry-run]

Runs under `deepspeed`, `torchrun`, `srun` with one task per rank, or plain `python`. Started again, the same command
goes on from the newest valid checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from math import exp, isfinite
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401  (before the libraries that would speak)
from pretrain.checkpoint import Checkpoints
from pretrain.config import Config, load_config
from pretrain.distributed import (
    Ranks,
    initialize,
    local_rank_from_environment,
    map_environment,
    on_every_rank,
    rank_from_environment,
)
from pretrain.engine import Step, build_engine, grad_norm, train_step, validation_loss
from pretrain.errors import SharedUserError, UserError
from pretrain.files import write_text
from pretrain.loss import CROSS_ENTROPY
from pretrain.method_state import load_method_state, save_method_state
from pretrain.model import initialize_weights
from pretrain.monitor.activations import record_activations
from pretrain.monitor.console import memory_bytes, progress_line
from pretrain.monitor.metrics import Metrics
from pretrain.monitor.throughput import Pace, Throughput
from pretrain.monitor.weights import WeightMonitor
from pretrain.optim import learning_rate
from pretrain.plan import (
    Plan,
    describe_plan,
    fixed_probe,
    make_plan,
    training_batches,
)
from pretrain.precision import check_accelerator
from pretrain.probe import probe_logits, save_probe
from pretrain.resilience.signals import StopFlag
from pretrain.resumed import changes
from pretrain.run_folder import RunFolder, log
from pretrain.sharded import ShardedWeights
from pretrain.tensor_parallel import data_rank
from pretrain.weight_table import describe_weights


def train(plan: Plan, folder: RunFolder, ranks: Ranks) -> None:
    """Train what `plan` describes, from its newest checkpoint or from the start, to its last step."""
    config, total = plan.config, plan.config.total_steps
    stop = StopFlag()
    log.info(describe_plan(plan))

    # Dropout: every data-parallel rank draws for itself, the ranks of a tensor-parallel group alike.
    torch.manual_seed(config.seed * plan.data_ranks + data_rank(config, ranks.rank))
    engine = build_engine(plan)
    weights = ShardedWeights(engine)
    checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint, ranks, log.info)
    step = start(plan, engine, weights, checkpoints)
    for method in config.methods:
        method.prepare(weights)
    folder.begin(config, step)
    metrics = Metrics(config, enabled=ranks.is_first)
    metrics.event(step, "resumed" if step else "started", parameters=plan.parameters, world_size=ranks.world_size)

    loader = training_batches(plan, ranks.rank, step)
    probe = on_every_rank(lambda: fixed_probe(plan)).to(ranks.device)
    weight_monitor = WeightMonitor(weights, config.log.weights_interval_steps)
    throughput = Throughput(config.tokens_per_step, plan.flops_per_token, ranks.world_size, step)
    signal = None

    while step < total and signal is None:
        folder.step = step = step + 1
        lr = learning_rate(config.optim, step, total)
        weight_monitor.before_step(step)
        done = train_step(engine, loader.next_batch(), lr, ranks, plan.corpora.masked)
        facts = weight_monitor.after_step(step)
        for method in config.methods:
            for name, seen in method.after_step(step, weights).items():
                facts.setdefault(name, {}).update(seen)
        signal = stop.agreed(ranks.device)

        if facts:
            metrics.write("weights", step, **facts)
        if due(step, config.log.interval_steps, total):
            pace = throughput.lap(step, total, loader.wait_s)
            report(metrics, plan, step, engine, done, lr, pace)
        throughput.pause()
        if plan.corpora.val and due(step, config.eval.interval_steps, total):
            evaluate(plan, engine, ranks, metrics, step)
        if due(step, config.log.activations_interval_steps, total):
            with record_activations(engine.module) as rows:
                probe_logits(engine.module, probe)
            metrics.write("activations", step, layers=rows)
        if signal or due(step, config.checkpoint.interval_steps, total):
            save(plan, engine, weights, checkpoints, metrics, step, probe)
        throughput.resume()

    loader.close()
    finish(folder, metrics, step, total, signal)


def start(plan: Plan, engine, weights: ShardedWeights, checkpoints: Checkpoints) -> int:
    """Load the checkpoint to go on from, or initialize the weights; returns the steps already done."""
    config, found = plan.config, checkpoints.find()
    if found is not None:
        changed = on_every_rank(lambda: changes(found, config))
        step = checkpoints.load(found, engine, plan.state_at(0), changed).step
        on_every_rank(lambda: load_method_state(found, config.methods, engine.module))
        log.info(f"resumed from {found} at step {step}" + f"; changed since then: {'; '.join(changed)}" * bool(changed))
        return step
    default_std = plan.model_config.initializer_range
    measured = initialize_weights(weights, config, default_std)
    log.info("\n" + describe_weights(plan.weights, config, default_std, measured) + "\n")
    return 0


def report(metrics: Metrics, plan: Plan, step: int, engine, done: Step, lr: float, pace: Pace) -> None:
    """One console line and one `train` row for the interval that ends at `step`.

    `first_sample` and `last_sample` are those of this very step, `epochs` how often each source has been read. `loss`
    is the plain cross-entropy; `loss_terms` holds what methods add to it. fp16 adds the loss scale of this step, and how
    many steps have been skipped so far because a gradient overflowed.
    """
    terms = {name: float(value) for name, value in done.losses.items()}
    total, loss, norm = terms.pop("total"), terms.pop(CROSS_ENTROPY), grad_norm(engine, done)
    log.info(progress_line(step, plan.config.total_steps, loss, norm, lr, pace))
    added = {"loss_terms": terms} if terms else {}
    scaling = {"loss_scale": done.loss_scale, "skipped": engine.skipped_steps} if plan.precision == "fp16" else {}
    metrics.write(
        "train",
        step,
        tokens=step * plan.config.tokens_per_step,
        first_sample=plan.samples_after(step - 1),
        last_sample=plan.samples_after(step) - 1,
        epochs=plan.corpora.epochs(plan.samples_after(step)),
        loss=loss,
        grad_norm=norm,
        lr=lr,
        tokens_per_s=pace.tokens_per_s,
        step_time_s=pace.step_time_s,
        data_wait=pace.data_wait,
        mfu=pace.mfu,
        memory_bytes=memory_bytes(),
        **added,
        **scaling,
    )
    if not isfinite(total):
        found = ", ".join(f"{name} {value}" for name, value in {CROSS_ENTROPY: loss, **terms}.items())
        raise FloatingPointError(f"the loss is not finite at step {step}: {found}")


def evaluate(plan: Plan, engine, ranks: Ranks, metrics: Metrics, step: int) -> None:
    """Validation loss and perplexity, on the console and as an `eval` row."""
    loss = validation_loss(engine, plan, ranks)
    perplexity = exp(min(loss, 700.0))
    metrics.write("eval", step, loss=loss, perplexity=perplexity)
    log.info(f"step {step:>7,}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")


def save(
    plan: Plan,
    engine,
    weights: ShardedWeights,
    checkpoints: Checkpoints,
    metrics: Metrics,
    step: int,
    probe: torch.Tensor,
) -> None:
    """A complete checkpoint, with what conversion needs: configurations, tokenizer, and what it must prove equal."""
    began = time.perf_counter()
    moments, logits = weights.moments(), probe_logits(engine.module, probe)

    def add_files(folder: Path) -> None:
        write_text(folder / "config.yaml", plan.config.to_yaml())
        plan.model_config.save_pretrained(folder / "hf")
        plan.tokenizer.save_pretrained(folder / "hf")
        save_probe(folder, probe, logits, moments)
        save_method_state(folder, plan.config.methods, engine.module)

    path = checkpoints.save(engine, plan.state_at(step), add_files)
    seconds = time.perf_counter() - began
    metrics.event(step, "checkpoint_saved", checkpoint=str(path), seconds=seconds)
    log.info(f"step {step:>7,}  saved {path} in {seconds:.1f} s")


def finish(folder: RunFolder, metrics: Metrics, step: int, total_steps: int, signal: str | None) -> None:
    """Record why the loop ended. Both ways exit with 0: launchers mask what another code would say."""
    status = "finished" if step >= total_steps else "preempted"
    reason = "all steps done" if status == "finished" else f"stopped by {signal} after saving"
    metrics.event(step, status, reason=reason)
    metrics.close()
    folder.status(status, reason)
    log.info(f"{status} at step {step:,}: {reason}. Run folder: {folder.path}")


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens at `step`."""
    return step % interval == 0 or step == last


def dry_run(config: Config) -> None:
    """Check everything and print the plan, for as many ranks as the launcher started; train nothing."""
    map_environment()
    if rank_from_environment() == 0:
        plan = make_plan(config, int(os.environ["WORLD_SIZE"]))
        print(describe_plan(plan))
        print("\n" + describe_weights(plan.weights, plan.config, plan.model_config.initializer_range))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a language model with its weights' variance under control.")
    parser.add_argument("--config", required=True, help="the run file, e.g. configs/tiny_tvr.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def main() -> None:
    """Exit codes: 0 done or preempted after saving, 2 the input was wrong, 1 anything else."""
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config, arguments.set)
        if arguments.dry_run:
            dry_run(config)
            return
        ranks = initialize()
    except UserError as error:
        # Nothing connects the ranks yet. Those of a node see the same files, so the first of each node speaks.
        refuse(error if local_rank_from_environment() == 0 else SharedUserError(str(error)))
    run(config, ranks)


def run(config: Config, ranks: Ranks) -> None:
    """Train, and turn what goes wrong into a status and an exit code."""
    folder = None
    try:
        plan = on_every_rank(lambda: make_plan(config, ranks.world_size, ranks.rank))
        on_every_rank(lambda: check_accelerator(plan.ds_config))
        folder = RunFolder(config.folder, ranks)
        train(plan, folder, ranks)
    except UserError as error:
        if folder is not None and folder.begun:
            folder.fail(str(error))
            if not ranks.is_first:
                log.warning(
                    f"error: {error}"
                )  # into this rank's file: what the console shows of it is up to the launcher
        refuse(error)
    except Exception as error:
        log.exception(f"rank {ranks.rank} failed: {error!r}")
        if folder is not None:
            folder.fail(repr(error))
        os._exit(1)  # peers may wait in a collective for ever; leaving at once lets the launcher end them
    dist.destroy_process_group()


def refuse(error: UserError) -> NoReturn:
    """End this rank with exit code 2 and the message: from rank 0 alone when every rank has the same one to tell.

    The other ranks linger, because a launcher that sees one rank leave kills the rest before rank 0 has spoken.
    """
    rank = rank_from_environment()
    if rank != 0:
        time.sleep(3)
    if rank == 0 or not isinstance(error, SharedUserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)


if __name__ == "__main__":
    main()
