"""One pretraining run, top to bottom.

    deepspeed pretrain/train.py --config configs/1b_tvr.yaml [--set key=value ...] [--dry-run]

Runs under `deepspeed`, `torchrun`, `srun` with one task per rank, or plain `python`. Started again, the same command
goes on from the newest valid checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain import startup
from pretrain.resilience import signals

if __name__ == "__main__":
    startup.begin()
    signals.catch()  # the libraries below take their seconds to load

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from pretrain import quiet  # noqa: F401  (before the libraries that would speak)
from pretrain.actions import (
    evaluate,
    examine,
    finish,
    look_at_activations,
    note_clipping,
    publish,
    report,
    roll_back,
    save,
)
from pretrain.checkpoints.folders import resolve
from pretrain.config import Config, ResilienceSection, load_config
from pretrain.distributed import (
    Ranks,
    initialize,
    local_rank_from_environment,
    map_environment,
    on_every_rank,
    rank_from_environment,
)
from pretrain.endings import end_alone, end_badly, refuse
from pretrain.engine import train_step
from pretrain.errors import MACHINE_FAULT, MachineFault, SharedUserError, UserError
from pretrain.monitor import tracker
from pretrain.monitor.weights import WeightMonitor
from pretrain.optim import learning_rate
from pretrain.optional import optional
from pretrain.plan import Plan, describe_plan, make_plan
from pretrain.precision import check_accelerator
from pretrain.resilience.agreement import check_start, check_step
from pretrain.resilience.autopsy import Autopsies
from pretrain.resilience.facts import facts_of_plan, facts_of_process
from pretrain.resilience.orders import Order, Orders
from pretrain.resilience.phase import enter
from pretrain.resilience.watchdog import Watchdog
from pretrain.run import start
from pretrain.run_folder import RunFolder, log
from pretrain.weight_table import describe_weights


def train(plan: Plan, folder: RunFolder, ranks: Ranks) -> None:
    """Train what `plan` describes, from its newest checkpoint or from the start, to its last step."""
    config, total = plan.config, plan.config.total_steps
    if ranks.is_first:
        log.info(describe_plan(plan))
    orders = Orders(folder.path, ranks, signals.catch())
    if order := orders.now():
        folder.not_started(order.stop, requested=order.requested)
        return
    run = start(plan, folder, ranks, orders)
    check_step(run.weights, config.methods, run.step, run.loader.position, lr=0.0)
    weight_monitor = WeightMonitor(run.weights, config.log.weights_interval_steps)
    autopsies = Autopsies(folder.path / "autopsies", config, run.recorder, ranks)
    if run.evaluation_due:
        evaluate(run)
    order = Order()

    while run.step < total or run.evaluation_due:
        order = orders.before_step(run.loader, run.step + 1)
        publish(run)
        with optional("tracking", "the tracking could not be looked after"):
            run.tracker.look()
        if order.stop:
            break
        if order.save:
            save(run)
            orders.saved()

        folder.step = run.step = step = run.step + 1
        lr = learning_rate(config.optim, step, total)
        weight_monitor.before_step(step)
        batches = run.loader.next_batch()
        done = train_step(run.gate, step, batches, lr, ranks, plan.corpora.masked)
        enter("methods")
        run.recorder.end_step(step, run.samples, done.losses, lr, done.clip_factor)
        facts = weight_monitor.after_step(step)
        for method in config.methods:
            for name, seen in method.after_step(step, run.weights).items():
                facts.setdefault(name, {}).update(seen)

        if facts:
            run.metrics.write("weights", step, **facts)
        if due(step, config.log.interval_steps, total):
            with optional("report", "a report could not be made"):
                report(run, done, lr, run.throughput.lap(step, total, run.loader.wait_s))
        run.throughput.pause()
        if done.verdict.kind in ("spike", "not finite"):
            examine(run, done, autopsies, batches)
        if 0 < done.clip_factor < 1:
            note_clipping(run, done)
        if run.gate.guard.must_go_back(last=step == total):
            roll_back(run)
            continue
        if step % config.resilience.agreement_interval_steps == 0:
            check_step(run.weights, config.methods, step, run.samples.stop, lr)
        if plan.corpora.val and due(step, config.eval.interval_steps, total):
            evaluate(run)
        if due(step, config.log.activations_interval_steps, total):
            look_at_activations(run)
        # While updates are skipped nothing is new, and what must be gone back to is not to be retired.
        if due(step, config.checkpoint.interval_steps, total) and not run.gate.guard.streak:
            save(run)
        run.throughput.resume()

    save(run)
    publish(run, wait=True)
    finish(run, order)


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens at `step`."""
    return step % interval == 0 or step == last


def dry_run(config: Config) -> None:
    """Check everything and print the plan, for as many ranks as the launcher started; train nothing."""
    signals.release()
    map_environment()
    if rank_from_environment() == 0:
        plan = make_plan(config, int(os.environ["WORLD_SIZE"]))
        if config.checkpoint.resume not in ("auto", "never"):
            resolve(Path(config.checkpoint.resume))
        print(describe_plan(plan))
        if tracker.mode_of(config.log.wandb) != "disabled":
            print(f"tracking  {tracker.describe(config.log.wandb)}")
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
    """The command line; pretrain/endings.py has the exit codes."""
    arguments = parse_arguments()
    signals.catch()
    try:
        config = load_config(arguments.config, arguments.set)
        if arguments.dry_run:
            dry_run(config)
            return
    except UserError as error:
        # Nothing connects the ranks yet. Those of a node see the same files, so the first of each node speaks.
        refuse(error if local_rank_from_environment() == 0 else SharedUserError(str(error)))
    run(config, meet(config))


def meet(config: Config) -> Ranks:
    """Join the other ranks. The communication library waits longer than the watchdog, which can tell for whom."""
    watchdog_s = config.resilience.watchdog_s
    try:
        return initialize(watchdog_s and 2 * watchdog_s + 60, signals.catch())
    except UserError as error:
        refuse(error)
    except (RuntimeError, MachineFault) as error:
        end_alone(error)


def run(config: Config, ranks: Ranks) -> None:
    """Train, and turn what goes wrong into a status and an exit code."""
    folder = None
    try:
        enter("checking the plan")
        check_start(lambda: facts_of_process(config))
        plan = on_every_rank(lambda: make_plan(config, ranks.world_size, ranks.rank))
        check_start(lambda: facts_of_plan(plan))
        on_every_rank(lambda: check_accelerator(plan.ds_config))
        folder = RunFolder(config.folder, ranks)
        log.info(f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}, process {os.getpid()}")
        with watched(folder, config.resilience, ranks):
            train(plan, folder, ranks)
            with suppress(RuntimeError):  # all is said and saved: a peer that has left already is no fault
                dist.destroy_process_group()
    except Exception as error:
        end_badly(error, folder, ranks)


@contextmanager
def watched(folder: RunFolder, config: ResilienceSection, ranks: Ranks) -> Iterator[None]:
    """The watchdog, where the run file wants one."""
    if config.watchdog_s is None:
        yield
        return

    def on_hang(verdict: str) -> None:
        log.error(verdict)
        folder.fail(verdict, MACHINE_FAULT)

    watchdog = Watchdog(folder.path, ranks, config.watchdog_s, on_hang)
    yield
    watchdog.close()


if __name__ == "__main__":
    main()
