"""One pretraining run, top to bottom.

    deepspeed pretrain/train.py --config configs/1b_tvr.yaml [--set key=value ...] [--dry-run]

Runs under `deepspeed`, `torchrun`, `srun` with one task per rank, or plain `python`. Started again, the same command
resumes from the newest valid checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the package is this one, whatever else is called so
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain import startup
from pretrain.distributed import signals

if __name__ == "__main__":
    startup.begin()
    signals.catch()  # the libraries below take seconds to load

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from pretrain import quiet  # noqa: F401  (before the libraries that it silences)
from pretrain.checkpoints.folders import find_start
from pretrain.cli.parser import tool_parser
from pretrain.config.schema import Config, ResilienceSection, load_config
from pretrain.distributed.ranks import (
    Ranks,
    initialize,
    local_rank_from_environment,
    map_environment,
    on_every_rank,
    rank_from_environment,
)
from pretrain.engine.compiler_checks import check_compiler
from pretrain.engine.determinism import compute_deterministically
from pretrain.engine.precision import check_accelerator
from pretrain.errors import MACHINE_FAULT, MachineFault, SharedUserError, UserError
from pretrain.monitor import tracker
from pretrain.monitor.logs import log
from pretrain.monitor.phase import enter
from pretrain.resilience.consistency import check_start
from pretrain.resilience.watchdog import Watchdog
from pretrain.trainer.exit_codes import end_alone, end_badly, refuse
from pretrain.trainer.plan import make_plan
from pretrain.trainer.plan_summary import describe_plan, describe_whole_memory
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.startup_facts import facts_of_plan, facts_of_process
from pretrain.trainer.trainer import train
from pretrain.trainer.weight_table import describe_weights


def dry_run(config: Config) -> None:
    """Check everything and print the plan for as many ranks as the launcher started. Train nothing."""
    signals.release()
    map_environment()
    if rank_from_environment() == 0:
        plan = make_plan(config, int(os.environ["WORLD_SIZE"]))
        if config.checkpoint.resume not in ("auto", "never"):
            find_start(Path(config.checkpoint.resume))
        print(describe_plan(plan))
        print(f"in all    {describe_whole_memory(plan)}")
        if tracker.mode_of(config.log.wandb) != "disabled":
            print(f"tracking  {tracker.describe(config.log.wandb)}")
        if plan.start is not None:
            plan.start.check_files()
        print("\n" + describe_weights(plan.weights, plan.config, plan.model_config.initializer_range, plan.start))


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = tool_parser("Pretrain a language model with its weights' variance under control.")
    parser.add_argument("--config", required=True, help="the run file, e.g. configs/tiny_tvr.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def main() -> None:
    """Run the command line. pretrain/trainer/exit_codes.py lists the exit codes."""
    arguments = parse_arguments()
    signals.catch()
    try:
        config = load_config(arguments.config, arguments.set)
        if arguments.dry_run:
            dry_run(config)
            return
    except UserError as error:
        # Nothing connects the ranks yet. Those of a node see the same files, so the first of each node reports.
        refuse(error if local_rank_from_environment() == 0 else SharedUserError(str(error)))
    run(config, meet(config))


def meet(config: Config) -> Ranks:
    """Join the other ranks. The communication library waits longer than the watchdog, which can name the rank at fault."""
    watchdog_s = config.resilience.watchdog_s
    try:
        if config.deterministic:
            compute_deterministically()
        return initialize(watchdog_s and 2 * watchdog_s + 60, signals.catch())
    except UserError as error:
        refuse(error)
    except (RuntimeError, MachineFault) as error:
        end_alone(error)


def run(config: Config, ranks: Ranks) -> None:
    """Train, and turn errors into a status and an exit code."""
    folder = None
    try:
        enter("checking the plan")
        check_start(lambda: facts_of_process(config))
        plan = on_every_rank(lambda: make_plan(config, ranks.world_size, ranks.rank))
        check_start(lambda: facts_of_plan(plan))
        on_every_rank(lambda: check_accelerator(plan.ds_config))
        on_every_rank(lambda: check_compiler(config))
        folder = RunFolder(config.folder, ranks)
        log.info(f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}, process {os.getpid()}")
        with watched(folder, config.resilience, ranks):
            train(plan, folder, ranks)
            with suppress(RuntimeError):  # everything is saved: a peer that has exited already is no fault
                dist.destroy_process_group()
    except Exception as error:
        end_badly(error, folder, ranks)


@contextmanager
def watched(folder: RunFolder, config: ResilienceSection, ranks: Ranks) -> Iterator[None]:
    """Run the watchdog during the block, if the run file asks for one."""
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
