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
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from math import exp
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401  (before the libraries that would speak)
from pretrain.checkpoint import Checkpoints
from pretrain.config import Config, load_config
from pretrain.data.loader import Loader
from pretrain.distributed import Ranks, initialize, map_environment, on_every_rank, rank_from_environment
from pretrain.errors import SharedUserError, UserError
from pretrain.files import write_text
from pretrain.model import build_model, initialize_weights
from pretrain.monitor.activations import record_activations
from pretrain.monitor.metrics import Metrics
from pretrain.monitor.throughput import Pace, Throughput
from pretrain.monitor.weights import WeightMonitor
from pretrain.optim import build_optimizer, learning_rate
from pretrain.plan import Plan, describe_plan, describe_weights, initial_rule_of, make_plan, validation_batches
from pretrain.probe import probe_batch, probe_logits, save_probe
from pretrain.resilience.signals import StopFlag
from pretrain.run_folder import RunFolder, log
from pretrain.sharded import ShardedWeights


def train(plan: Plan, folder: RunFolder, ranks: Ranks) -> None:
    """Train what `plan` describes, from its newest checkpoint or from the start, to its last step."""
    config = plan.config
    stop = StopFlag()
    log.info(describe_plan(plan))

    engine = build_engine(plan)
    weights = ShardedWeights(engine)
    checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint, ranks, log.info)
    metrics = Metrics(config, enabled=ranks.is_first)
    step = start(plan, engine, weights, checkpoints, metrics)
    folder.begin(config, step)

    loader = Loader(
        plan.train_shards,
        seq_len=config.data.seq_len,
        global_batch_size=config.data.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        position=plan.state_at(step).samples,
    )
    probe = probe_batch(torch.from_numpy(plan.train_shards.read(0, 4096).astype("int64")), config.data.seq_len)
    probe = probe.to(ranks.device)
    weight_monitor = WeightMonitor(weights, config.log.weights_interval_steps)
    throughput = Throughput(config.tokens_per_step, plan.flops_per_token, ranks.world_size)
    signal = None

    while step < config.total_steps and signal is None:
        folder.step = step = step + 1
        lr = set_learning_rate(engine, learning_rate(config.optim, step, config.total_steps))
        weight_monitor.before_step(step)
        loss = train_step(engine, loader.next_batch(), ranks)
        facts = weight_monitor.after_step(step)
        for method in config.methods:
            for name, seen in method.after_step(step, engine).items():
                facts.setdefault(name, {}).update(seen)
        if facts:
            metrics.write("weights", step, **facts)

        if due(step, config.log.interval_steps, config.total_steps):
            report_step(plan, engine, loader, throughput, metrics, step, float(loss), lr)
        throughput.pause()
        signal = stop.agreed(ranks.device)
        if plan.val_shards and due(step, config.eval.interval_steps, config.total_steps):
            evaluate(plan, engine, ranks, metrics, step)
        if due(step, config.log.activations_interval_steps, config.total_steps):
            with record_activations(engine.module) as rows:
                probe_logits(engine.module, probe)
            metrics.write("activations", step, layers=rows)
        if signal or due(step, config.checkpoint.interval_steps, config.total_steps):
            save(plan, engine, checkpoints, metrics, step, probe)
        throughput.resume()

    loader.close()
    finish(folder, metrics, step, config.total_steps, signal)


def build_engine(plan: Plan):
    """The DeepSpeed engine around the sharded model; its weights hold no values yet."""
    import deepspeed

    model = build_model(plan.config, plan.model_config, plan.ds_config)
    optimizer = build_optimizer(model, plan.config.optim)
    with redirect_stdout(StringIO()):  # DeepSpeed's memory reports
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.ds_config)
    return engine


def start(plan: Plan, engine, weights: ShardedWeights, checkpoints: Checkpoints, metrics: Metrics) -> int:
    """Load the checkpoint to go on from, or initialize the weights; returns the steps already done."""
    rule = initial_rule_of(plan)
    found = checkpoints.find()
    if found is not None:
        step = checkpoints.load(found, engine, plan.state_at(0)).step
        log.info(f"resumed from {found} at step {step}")
        metrics.event(step, "resumed", checkpoint=str(found))
        return step
    measured = initialize_weights(weights, plan.config.methods, plan.model_config.initializer_range, plan.config.seed)
    log.info("\n" + describe_weights(plan.weights, rule, plan.config, measured) + "\n")
    metrics.event(0, "started", parameters=plan.parameters, world_size=plan.world_size)
    return 0


def train_step(engine, micro_batches: list[torch.Tensor], ranks: Ranks) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches; returns the loss averaged over the global batch (float64)."""
    engine.train()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for tokens in micro_batches:
        tokens = tokens.to(ranks.device, non_blocking=True)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        total += loss.detach().double()
    return mean_over_ranks(total / len(micro_batches), ranks)


@torch.no_grad()
def evaluate(plan: Plan, engine, ranks: Ranks, metrics: Metrics, step: int) -> None:
    """Validation loss over the first batches of the validation shards, the same tokens every time."""
    engine.eval()
    losses = [
        engine(tokens[:, :-1].to(ranks.device), tokens[:, 1:].to(ranks.device)).double()
        for tokens in validation_batches(plan, ranks.rank)
    ]
    loss = float(mean_over_ranks(torch.stack(losses).mean(), ranks))
    metrics.write("eval", step, loss=loss, perplexity=exp(min(loss, 700.0)))
    log.info(f"step {step:>7,}  validation loss {loss:.4f}  perplexity {exp(min(loss, 700.0)):.2f}")


def report_step(
    plan: Plan, engine, loader: Loader, throughput: Throughput, metrics: Metrics, step: int, loss: float, lr: float
) -> None:
    """One console line and one `train` row for the interval that ends at `step`."""
    total, every = plan.config.total_steps, plan.config.log.interval_steps
    steps = step % every or every
    pace = throughput.lap(steps, total - step, loader.wait_s)
    grad_norm = float(engine.get_global_grad_norm() or 0.0)
    log.info(console_line(step, total, loss, grad_norm, lr, pace))
    metrics.write(
        "train",
        step,
        tokens=step * plan.config.tokens_per_step,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens_per_s=pace.tokens_per_s,
        step_time_s=pace.step_time_s,
        data_wait=pace.data_wait,
        mfu=pace.mfu,
        memory_bytes=memory_bytes(),
    )
    if not torch.isfinite(torch.tensor(loss)):
        raise FloatingPointError(f"the loss is {loss} at step {step}")


def save(plan: Plan, engine, checkpoints: Checkpoints, metrics: Metrics, step: int, probe: torch.Tensor) -> None:
    """A complete checkpoint, with what conversion needs: configurations, tokenizer and the probe's logits."""
    began = time.perf_counter()
    logits = probe_logits(engine.module, probe)

    def add_files(folder: Path) -> None:
        write_text(folder / "config.yaml", plan.config.to_yaml())
        plan.model_config.save_pretrained(folder / "hf")
        plan.tokenizer.save_pretrained(folder / "hf")
        save_probe(folder, probe, logits)

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


def set_learning_rate(engine, lr: float) -> float:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The mean of a scalar over all ranks."""
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world_size


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens at `step`."""
    return step % interval == 0 or step == last


def console_line(step: int, total: int, loss: float, grad_norm: float, lr: float, pace: Pace) -> str:
    mfu = f"mfu {pace.mfu:.1%}  " if pace.mfu is not None else ""
    return (
        f"step {step:>7,}/{total:,}  loss {loss:.4f}  grad norm {grad_norm:.3f}  lr {lr:.2e}  "
        f"{pace.tokens_per_s:,.0f} tokens/s  {mfu}data wait {pace.data_wait:.1%}  "
        f"ETA {timedelta(seconds=round(pace.remaining_s))}"
    )


def memory_bytes() -> int:
    """Peak memory of this rank so far: the GPU's allocator's, or the process's resident set on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dry_run(config: Config) -> None:
    """Check everything and print the plan, for as many ranks as the launcher started; train nothing."""
    map_environment()
    if rank_from_environment() == 0:
        plan = make_plan(config, int(os.environ["WORLD_SIZE"]))
        print(describe_plan(plan))
        print("\n" + describe_weights(plan.weights, initial_rule_of(plan), config))


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
        refuse(SharedUserError(str(error)))
    run(config, ranks)


def run(config: Config, ranks: Ranks) -> None:
    """Train, and turn what goes wrong into a status and an exit code."""
    folder = None
    try:
        plan = on_every_rank(lambda: make_plan(config, ranks.world_size, ranks.rank))
        folder = RunFolder(config.folder, ranks)
        train(plan, folder, ranks)
    except UserError as error:
        if folder is not None and folder.begun:
            folder.fail(str(error))
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
    if rank == 0 or not isinstance(error, SharedUserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    os._exit(2)


if __name__ == "__main__":
    main()
