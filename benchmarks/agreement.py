"""Measure one check of the ranks' consistency beside a training step, by ZeRO stage and precision.

torchrun --nproc-per-node=2 -m benchmarks.agreement
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.llama import Llama
from benchmarks.table import render
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import all_gather_object, initialize
from pretrain.resilience.consistency import check_step

HIDDEN_SIZE, LAYERS, TOKENS, ROUNDS = 512, 14, 1024, 3
BF16 = {"bf16": {"enabled": True}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO-0, fp32": {"zero_optimization": {"stage": 0}},
    "ZeRO-1, bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "ZeRO-3, fp32": {"zero_optimization": {"stage": 3}},
}


def measure(deepspeed: dict[str, Any]) -> tuple[int, float, float]:
    """Return the number of parameters and the seconds of a training step and of a check.

    The seconds are medians over the rounds, of the slowest rank.
    """
    llama = Llama(HIDDEN_SIZE, LAYERS, TOKENS, deepspeed)
    llama.step()
    check_step(llama.weights, (), 0, 0, 0.0)
    steps, checks = [], []
    for _ in range(ROUNDS):
        steps.append(_seconds(llama.step))
        checks.append(_seconds(lambda: check_step(llama.weights, (), 0, 0, 0.0)))
    parameters = sum(weight.numel for weight in llama.weights.layout.values())
    return parameters, median(steps), median(checks)


def _seconds(call: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(all_gather_object(time.perf_counter() - began))


def main() -> None:
    ranks = initialize()
    rows = []
    for name, deepspeed in LAYOUTS.items():
        parameters, step, check = measure(deepspeed)
        gc.collect()  # an engine holds itself in cycles
        rows.append(
            [name, f"{parameters / 1e6:.1f}M", f"{step:.2f}", f"{check * 1e3:.0f}", f"{check / step / 500:.1e}"]
        )
    if ranks.is_first:
        print(render(["layout", "parameters", "step (s)", "check (ms)", "of the time, every 500 steps"], rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
