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
    task.time_loop(model, lambda number: model.set_requires_gradient_sync(number == task.accumulation - 1))


if __name__ == "__main__":
    main()
