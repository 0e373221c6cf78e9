"""The start of each command line: ready this process before any library loads, then import the tool and run it.

Console scripts of the wheel and the files in tools/ call these functions. This module imports nothing that loads a library.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

from pretrain import startup


def start(module: str) -> None:
    """Run `main()` of `module` as a tool, and end this process as `pretrain.cli.command.run` says."""
    startup.begin()
    from pretrain.cli.command import run

    run(import_module(module).main)


def train() -> None:
    """Run one rank of a training, as `python pretrain/train.py` does."""
    startup.begin()
    from pretrain.distributed import signals

    signals.catch()  # the libraries take their seconds to load
    import_module("pretrain.train").main()


check_node = partial(start, "pretrain.cli.check_node")
convert_checkpoint = partial(start, "pretrain.cli.convert_checkpoint")
convert_to_hf = partial(start, "pretrain.cli.convert_to_hf")
evaluate = partial(start, "pretrain.cli.evaluate")
generate = partial(start, "pretrain.cli.generate")
gpu_check = partial(start, "pretrain.cli.gpu_check")
inspect_data = partial(start, "pretrain.cli.inspect_data")
plan = partial(start, "pretrain.cli.plan")
prepare_data = partial(start, "pretrain.cli.prepare_data")
report = partial(start, "pretrain.cli.report")
slurm_job = partial(start, "pretrain.cli.slurm_job")
sync_wandb = partial(start, "pretrain.cli.sync_wandb")
train_tokenizer = partial(start, "pretrain.cli.train_tokenizer")
