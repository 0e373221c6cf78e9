"""One rank of the trap measurement; started by trap.py. The first rank prints one JSON line per way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from benchmarks.llama import SEQ_LEN, STD, Llama
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import initialize

TARGET, RATIO = STD / 2, 1.2
_TVR = {"name": "tvr", "target_std": TARGET, "ratio_threshold": RATIO, "interval_steps": 1}
LARGE = "model.layers.0.mlp.up_proj.weight"  # 174,592 elements: ZeRO-3 keeps only pieces of it
SMALL = "model.layers.0.self_attn.q_proj.weight"  # 65,536 elements: ZeRO-3 keeps a resident copy too

# Changes one weight of the model; returns the deviation that it saw.
Way = Callable[[Llama, str], float]


def published(llama: Llama, name: str) -> float:
    """Apply the published callback: statistics and rescale of `module.weight.data`."""
    weight = _parameter(llama, name).data
    std, mean = weight.std(), weight.mean()
    if std / TARGET > RATIO:
        weight.copy_((weight - mean) * (TARGET / std) + mean)
    return float(std)


def published_in_gathered_parameters(llama: Llama, name: str) -> float:
    """Apply it within DeepSpeed's context, which gives the full weight and keeps rank 0's changes of it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([_parameter(llama, name)], modifier_rank=0):
        return published(llama, name)


def published_on_the_master(llama: Llama, name: str) -> float:
    """Apply it to the full fp32 master, through DeepSpeed's `safe_get_` and `safe_set_full_fp32_param`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    parameter = _parameter(llama, name)
    full = safe_get_full_fp32_param(parameter)
    std, mean = full.std(), full.mean()
    if std / TARGET > RATIO:
        safe_set_full_fp32_param(parameter, (full - mean) * (TARGET / std) + mean)
    return float(std)


def evenkeel(llama: Llama, name: str) -> float:
    """Apply TVR as shipped."""
    (method,) = llama.config.methods
    return float(method.after_step(1, llama.weights)[name]["std"])


# ZeRO stage -> (title in the table, the way, the weight)
WAYS: dict[int, list[tuple[str, Way, str]]] = {
    1: [
        ("published", published, LARGE),
        ("published, on safe_get / safe_set_full_fp32_param", published_on_the_master, LARGE),
        ("Evenkeel", evenkeel, LARGE),
    ],
    3: [
        ("published", published, LARGE),
        ("published, a weight under the persistence threshold", published, SMALL),
        ("published, in GatheredParameters(modifier_rank=0)", published_in_gathered_parameters, LARGE),
        ("published, on safe_get / safe_set_full_fp32_param", published_on_the_master, LARGE),
        ("Evenkeel", evenkeel, LARGE),
        ("Evenkeel, a weight under the persistence threshold", evenkeel, SMALL),
    ],
}


def measure(llama: Llama, way: Way, name: str) -> dict[str, float]:
    """Return deviations of one weight: as the way saw it, and of both copies after it and after a step that moves nothing."""
    llama.fill()
    llama.step(lr=0.0)
    seen = way(llama, name)
    after = {"working": _working_std(llama, name), "master": _master_std(llama, name)}
    llama.step(lr=0.0)
    return {"seen": seen, **after, "next": _working_std(llama, name)}


def _parameter(llama: Llama, name: str) -> torch.nn.Parameter:
    return llama.engine.module.get_parameter(name)


def _working_std(llama: Llama, name: str) -> float:
    """Return the deviation of the full weight that forward reads."""
    import deepspeed

    parameter = _parameter(llama, name)
    with deepspeed.zero.GatheredParameters([parameter]):
        return float(parameter.detach().double().std())


def _master_std(llama: Llama, name: str) -> float:
    from deepspeed.utils import safe_get_full_fp32_param

    return float(safe_get_full_fp32_param(_parameter(llama, name)).double().std())


def main() -> None:
    ranks = initialize()
    for stage in json.loads(sys.argv[1]):
        ds_json = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        llama = Llama(256, 2, SEQ_LEN * ranks.world_size, ds_json, {"methods": [_TVR]})
        for title, way, name in WAYS[stage]:
            row = {"stage": stage, "way": title, **measure(llama, way, name)}
            if ranks.is_first:
                print(json.dumps(row), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
