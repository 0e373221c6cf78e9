"""Prepare a Slurm job's run, and decide what follows its end. slurm/job.sh calls it; Slurm's variables name the job.

    python tools/slurm_job.py prepare --config configs/1b_tvr.yaml --set seed=1     (or: --list sweep.txt --line 3)
    python tools/slurm_job.py verdict --run runs/1b_tvr --code 1

`prepare` prints the folder with the code that the job runs, or nothing where there is nothing to do. `verdict` prints
"requeue [NODES TO EXCLUDE]" or "end CODE". Messages for people go to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.cluster.slurm_attempts import Attempts, Job


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--max-restarts", type=argument_types.whole(), default=100, help="requeues of one job (default: %(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="check the run file, keep the code, note the start")
    _add_run_arguments(prepare)
    verdict = commands.add_parser("verdict", help="whether the job goes back into the queue")
    verdict.add_argument("--run", type=argument_types.path, required=True, help="the run folder")
    verdict.add_argument("--code", type=argument_types.whole(), required=True, help="srun's exit code")
    verdict.add_argument(
        "--nodes", type=argument_types.whole(), default=1, help="nodes of the job (default: %(default)s)"
    )
    verdict.add_argument("--told-to-stop", action="store_true", help="the batch script was signalled")
    options = parser.parse_args()
    job = Job.from_environment(os.environ)
    act = _prepare if options.command == "prepare" else _verdict
    with redirect_stdout(sys.stderr):  # libraries print while they are imported; the script reads stdout
        answer = act(options, job)
    print(answer)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=argument_types.path, help="the run file")
    which.add_argument(
        "--list", type=argument_types.path, help="a file of runs, one a line: RUN_FILE [--set KEY=VALUE ...]"
    )
    parser.add_argument(
        "--line", type=argument_types.whole(), default=1, help="which run of the list (default: %(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")


def _prepare(options: argparse.Namespace, job: Job) -> str:
    from pretrain.cluster.slurm_prepare import prepare, reason_not_to_start, words_of
    from pretrain.config.schema import load_config

    if options.list:
        options = _parse_line(words_of(options.list, options.line), options)
    config = load_config(options.config, options.set)
    if reason := reason_not_to_start(config):
        print(f"nothing to do: {reason}")
        return ""
    return str(prepare(config, job, os.environ))


def _parse_line(words: list[str], options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the run file and settings of a line of the list. The command line's settings come after."""
    parser = argparse.ArgumentParser(prog=f"{options.list}, run {options.line}")
    parser.add_argument("config", type=argument_types.path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    run = parser.parse_args(words)
    return argparse.Namespace(config=run.config, set=[*run.set, *options.set], max_restarts=options.max_restarts)


def _verdict(options: argparse.Namespace, job: Job) -> str:
    from pretrain.cluster.requeue import decide

    attempts = Attempts(options.run, job)
    decision = decide(attempts, options.code, options.told_to_stop, options.nodes, options.max_restarts)
    print(f"{decision.outcome}: {decision.reason}")
    return f"requeue {','.join(decision.exclude)}" if decision.requeue else f"end {decision.code}"
