"""One rank of benchmarks/methods.py: steps with and without each method, interleaved; prints the ratios of their times."""

from __future__ import annotations

import gc
import json
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.llama import Llama
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import initialize

_ZERO3 = {"zero_optimization": {"stage": 3}}


def measure(asked: dict) -> None:
    """Print {"name", "ratios"} for each rival: the time of a step with it over that of the plain step before it."""
    size = asked["hidden_size"], asked["layers"], asked["tokens"]
    plain = Llama(*size, _ZERO3)
    for name, changes in asked["rivals"].items():
        rival = Llama(*size, _ZERO3, changes)
        for method in rival.config.methods:
            method.prepare(rival.weights)
        ratios = []
        for number in range(asked["rounds"] + 1):
            base, own = _seconds(plain, number), _seconds(rival, number)
            ratios.append(own / base)
        if dist.get_rank() == 0:
            print(json.dumps({"name": name, "ratios": ratios[1:]}))  # the first round warms up
        del rival
        gc.collect()


def _seconds(llama: Llama, number: int) -> float:
    """Return the seconds, on the slowest rank, of one step and of the methods' work after it."""
    dist.barrier()
    began = time.perf_counter()
    llama.step()
    for method in llama.config.methods:
        method.after_step(number + 1, llama.weights)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - began, device=llama.engine.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


if __name__ == "__main__":
    initialize()
    measure(json.loads(sys.argv[1]))
