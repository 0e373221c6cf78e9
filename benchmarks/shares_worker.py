"""One rank of the measurement of shares: the time of parts of Evenkeel's step beside that of the whole step."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.llama import Llama
from pretrain import quiet  # noqa: F401
from pretrain.autopsy import Recorder
from pretrain.config.schema import GuardSection
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.step import train_step
from pretrain.engine.step_gate import StepGate
from pretrain.resilience.spike_guard import SpikeGuard

TVR = {"name": "tvr", "target_std": 0.02, "interval_steps": 1}


class Clock:
    """The seconds of named parts of the present step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to a part. The device is waited for before and after."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - began

        return call

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(asked: dict[str, Any], ranks: Ranks) -> dict[str, float]:
    """Return the median share of each part in a step of the model, by its name."""
    clock = Clock()
    llama = Llama(asked["hidden_size"], asked["layers"], asked["tokens"], asked["deepspeed"], {"methods": [TVR]})
    (tvr,) = llama.config.methods
    gate = StepGate(llama.engine, SpikeGuard(GuardSection()))
    optimizer = llama.engine.basic_optimizer
    gate._optimizer_step = clock.timed("optimizer", gate._optimizer_step)
    optimizer.step = clock.timed("gate and optimizer", optimizer.step)
    recorder = Recorder(llama.engine, llama.weights, steps=8)
    gate.watchers.append(clock.timed("recorder", recorder.gradients))
    hooks = optimizer._optimizer_step_post_hooks  # in which the recorder reads steps back
    hooks.update({number: clock.timed("reading back", hook) for number, hook in hooks.items()})
    tvr.prepare(llama.weights)
    batches = [MicroBatch(llama.tokens.cpu())] * llama.engine.gradient_accumulation_steps()
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(1, asked["rounds"] + 2):
        clock.seconds.clear()
        began = clock.now()
        result = train_step(gate, step, batches, 1e-4, ranks, masked=False)
        clock.timed("recorder", recorder.end_step)(step, range(1), result.losses, 1e-4, result.clip_factor)
        clock.timed("TVR", tvr.after_step)(step, llama.weights)
        whole = clock.now() - began
        clock.seconds["gate"] = clock.seconds.pop("gate and optimizer") - clock.seconds["optimizer"]
        read_back = clock.seconds.pop("reading back")
        clock.seconds["recorder"] += read_back
        clock.seconds["optimizer"] -= read_back
        if step > 1:  # the first one warms up
            for part, seconds in clock.seconds.items():
                shares[part].append(seconds / whole)
    return {part: median(values) for part, values in shares.items()}


if __name__ == "__main__":
    here = initialize()
    found = measure(json.loads(sys.argv[1]), here)
    if here.is_first:
        print(json.dumps(found))
