"""FSDP2: torch's fully_shard on each block and on the model, as torchtitan applies it, in a plain loop."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from benchmarks.rivals.same_task import SameTask
from pretrain import quiet  # noqa: F401
from pretrain.engine.deepspeed_config import read_deepspeed
from pretrain.model.layout import blocks_of


def main() -> None:
    task = SameTask.on_ranks()
    model = task.model()
    half = read_deepspeed(task.config)[1].get("bf16", {}).get("enabled")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(task.device.type, (task.ranks,))
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    optimizer = task.adamw(model)

    def step() -> None:
        for number in range(task.accumulation):
            model.set_requires_gradient_sync(number == task.accumulation - 1)
            (task.loss(model) / task.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.config.optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    task.time(step)


if __name__ == "__main__":
    main()
