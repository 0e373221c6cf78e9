"""DeepSpeed as its documentation has it: the stock model, torch AdamW and the run's DeepSpeed file in a plain loop."""

from __future__ import annotations

import deepspeed

from benchmarks.rivals.same_task import SameTask
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import initialize
from pretrain.engine.deepspeed_config import deepspeed_config


def main() -> None:
    ranks = initialize()  # as DeepSpeed's own, without the collective that it would compile on a CPU
    task = SameTask(ranks.world_size, ranks.rank)
    ds_config = deepspeed_config(task.config, ranks.world_size)
    model = task.model()
    engine, *_ = deepspeed.initialize(model=model, optimizer=task.adamw(model), config=ds_config)

    def step() -> None:
        for _ in range(task.accumulation):
            engine.backward(task.loss(engine))
            engine.step()

    task.time(step)


if __name__ == "__main__":
    main()
