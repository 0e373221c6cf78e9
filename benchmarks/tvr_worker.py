"""One rank of the TVR measurement; started by tvr.py. The first rank prints one JSON line per model size."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from benchmarks.llama import STD, Llama
from benchmarks.memory import peak_extra_bytes
from benchmarks.traffic import Traffic
from benchmarks.tvr_released import apply_released
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import all_gather_object, initialize

APPLICATIONS = 3  # number of them, for each scheme after each training step
AGREEMENT = 1e-6  # largest relative distance of two fp32 results
_TVR = {"name": "tvr", "ratio_threshold": 1, "interval_steps": 1}

T = TypeVar("T")

# Applies TVR with a target and returns how many matrices it rescaled.
Scheme = Callable[[float], int]


def measure(hidden_size: int, layers: int, tokens: int, rounds: int, resident_below: int) -> dict:
    """Return seconds, traffic and memory of every scheme, and seconds of a training step, of the slowest or largest rank."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": resident_below}
    llama = Llama(hidden_size, layers, tokens, {"zero_optimization": zero}, {"methods": [_TVR]})
    matrices = [name for name, weight in llama.weights.layout.items() if weight.in_block_matrix]
    schemes: dict[str, Scheme] = {
        "sharded": lambda target: _by_method(llama, "sharded", target),
        "gathered": lambda target: _by_method(llama, "gathered", target),
        "released": lambda target: len(apply_released(llama.weights, matrices, target, 1.0)),
    }
    llama.step()
    distance = check_agreement(llama, schemes)
    targets = _falling(STD / 2)
    samples: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        samples.setdefault(key, []).append(value)

    for name, scheme in schemes.items():
        llama.settle()
        with Traffic() as traffic:
            _expect(len(matrices), scheme(next(targets)))
        note(f"{name} received", traffic.received)
        note(f"{name} collectives", traffic.collectives)
        llama.settle()
        note(f"{name} peak", peak_extra_bytes(partial(_apply, scheme, targets)))
    for _ in range(rounds):
        note("step", _seconds(llama.step)[0])
        for _ in range(APPLICATIONS):
            for name, scheme in schemes.items():
                llama.settle()
                seconds, rescaled = _seconds(partial(_apply, scheme, targets))
                _expect(len(matrices), rescaled)
                note(f"{name} all", seconds)
                llama.settle()
                seconds, rescaled = _seconds(partial(scheme, 1.0))
                _expect(0, rescaled)
                note(f"{name} none", seconds)
    parameters = sum(weight.numel for weight in llama.weights.layout.values())
    return {"parameters": parameters, "matrices": len(matrices), "distance": distance, **_worst_of_ranks(samples)}


def check_agreement(llama: Llama, schemes: dict[str, Scheme]) -> float:
    """Return the largest relative distance of a weight after one scheme from the same weight after the first scheme.

    Raises:
        RuntimeError: If it is more than fp32 rounding: the schemes would not be doing the same work.
    """
    largest, reference = 0.0, None
    for name, scheme in schemes.items():
        llama.fill()
        scheme(STD / 2)
        if reference is None:
            reference = llama.weights.snapshot()
            norms = {name: moments.squared_norm for name, moments in llama.weights.moments().items()}
        away = llama.weights.squared_change(reference)
        distance = max(away[weight] / norms[weight] for weight in away) ** 0.5
        if not distance < AGREEMENT:
            raise RuntimeError(f"after one application, weights of '{name}' are {distance:.1e} away from the others'")
        largest = max(largest, distance)
    return largest


def _apply(scheme: Scheme, targets: Iterator[float]) -> int:
    return scheme(next(targets))


def _by_method(llama: Llama, engine: str, target: float) -> int:
    (method,) = llama.config.methods
    statistics = method.model_copy(update={"engine": engine, "target_std": target}).after_step(1, llama.weights)
    return sum(bool(weight["rescaled"]) for weight in statistics.values())


def _falling(target: float) -> Iterator[float]:
    """Yield targets, each below the deviation that the one before left, so that every matrix is rescaled."""
    while True:
        target *= 0.99
        yield target


def _expect(due: int, rescaled: int) -> None:
    if rescaled != due:
        raise RuntimeError(f"{rescaled} matrices were rescaled where {due} were due")


def _seconds(call: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds of this rank from a common start, waits for other ranks included, and the result."""
    dist.barrier()
    _finish()
    began = time.perf_counter()
    result = call()
    _finish()
    return time.perf_counter() - began, result


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _worst_of_ranks(samples: dict[str, list[float]]) -> dict[str, float]:
    """Return the median over the samples of the largest value over the ranks."""
    ranks = all_gather_object(samples)
    return {key: median(map(max, zip(*(rank[key] for rank in ranks), strict=True))) for key in samples}


def main() -> None:
    ranks = initialize()
    asked = json.loads(sys.argv[1])
    for hidden_size, layers in asked.pop("sizes"):
        result = measure(hidden_size, layers, **asked)
        gc.collect()  # an engine holds itself in cycles, and the next one is larger
        if ranks.is_first:
            print(json.dumps({"ranks": ranks.world_size, **result}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
