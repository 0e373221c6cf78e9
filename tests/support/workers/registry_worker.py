"""A rank that runs many trainings, one after another.

Its cases: {name: {"config": run configuration, "resume_at": step or None, "initial": bool}}. Each is trained by
`pretrain.trainer.trainer.train` in its run folder, with `initial` after the initial weights were written to
<run folder>.initial.pt. With `resume_at`, a second run, called <name>_resumed, starts from the first one's checkpoint of
that step in a new engine. An exception of a run is written to <run folder>.error. After a refusal, which all ranks share,
the next case is run. Any other exception may have left the others in a collective, so it ends them all.
"""

import os
import shutil
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.config.schema import Config
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.errors import UserError
from pretrain.sharded import ShardedWeights, gathered
from pretrain.trainer.plan import make_plan
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.trainer import train
from tests.support.tiny_engines import forget_garbage, leave


def run(config: Config, ranks: Ranks) -> None:
    train(make_plan(config, ranks.world_size, ranks.rank), RunFolder(config.folder, ranks), ranks)


def write_initial(config: Config, ranks: Ranks) -> None:
    plan = make_plan(config, ranks.world_size, ranks.rank)
    weights = ShardedWeights(build_engine(plan.config, plan.model_config, plan.ds_config))
    initialize_weights(weights, plan.config, plan.model_config.initializer_range)
    initial = {name: full.clone() for name, full in gathered(weights)}
    if ranks.is_first:
        config.folder.parent.mkdir(parents=True, exist_ok=True)
        torch.save(initial, f"{config.folder}.initial.pt")


def resumed(config: Config, step: int, ranks: Ranks) -> Config:
    again = config.model_copy(update={"name": f"{config.name}_resumed"})
    if ranks.is_first:
        shutil.copytree(config.folder / f"checkpoints/step_{step:08d}", again.folder / f"checkpoints/step_{step:08d}")
    dist.barrier()
    return again


def train_all(cases: dict[str, dict]) -> None:
    """Be a rank."""
    ranks = initialize()
    for case in cases.values():
        forget_garbage()
        config = Config.model_validate(case["config"])
        try:
            if case["initial"]:
                write_initial(config, ranks)
            run(config, ranks)
            if case["resume_at"]:
                run(resumed(config, case["resume_at"], ranks), ranks)
        except Exception as error:
            Path(f"{config.folder}.error").write_text(traceback.format_exc(), encoding="utf-8")
            if not isinstance(error, UserError):
                os._exit(1)
    leave()
