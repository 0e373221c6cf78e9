"""Checks of DeepSpeed's `zero_optimization` block.

DeepSpeed has many ways to keep weights. In some of them the methods would change copies that nothing reads, or a resumed
run would continue from other weights. A run that would be silently wrong does not start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.engine.deepspeed_blocks import parse
from pretrain.errors import UserError

# Keys that change the values or the place of weights, and that no test covers.
_OTHER_WEIGHTS = "forward would read quantized weights instead of those that the methods set"
_UNTESTED = {
    "zero_quantized_weights": _OTHER_WEIGHTS,
    "zero_quantized_nontrainable_weights": _OTHER_WEIGHTS,
    "zero_quantized_gradients": "it rounds gradients in a way that has not been measured here",
    "zenflow": "it steps most weights later than the step after which the methods act",
    "elastic_checkpoint": "it stores the weights in a layout that resuming and conversion cannot read",
}

# Keys that cannot be switched off.
_NEEDED = {
    "load_from_fp32_weights": "a resumed run would continue from rounded masters instead of the stored ones",
    "compute_grad_norm": "gradients are clipped by their norm, and it is logged",
}

# The lowest stage at which a block has an effect.
_FIRST_STAGE = {"offload_optimizer": 1, "offload_param": 3}

# See docs/sharded_weights.md.
_NVME = {
    "offload_param": "the working copies would be on disk when a method changes them. Offload them to the CPU",
    "offload_optimizer": "DeepSpeed saves such a run but does not restore it: after a resume Adam's step counter, and the "
    "weights of groups below 1 MB, start from zero, and the losses differ. Offload the optimizer to the CPU",
}


def check_zero(zero: dict[str, Any], source: str) -> None:
    """Raise UserError, which names the `source`, for a block that DeepSpeed or Evenkeel cannot take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parsed = parse(DeepSpeedZeroConfig, zero, "zero_optimization", source)
    for complaint in (*_about_keys(zero), *_about_offloading(parsed)):
        raise UserError(f"{source}: zero_optimization.{complaint}.")


def _about_keys(zero: dict[str, Any]) -> Iterator[str]:
    for key, reason in _UNTESTED.items():
        if zero.get(key) not in (None, False):
            yield f"{key} is not supported: {reason}"
    for key, reason in _NEEDED.items():
        if zero.get(key) is False:
            yield f"{key} false is not supported: {reason}"


def _about_offloading(parsed: Any) -> Iterator[str]:
    for key, first in _FIRST_STAGE.items():
        offload = getattr(parsed, key)
        if offload is not None and parsed.stage < first:
            yield f"{key} has no effect at stage {parsed.stage}. Remove the block"
        if offload is not None and offload.device == "nvme":
            yield f"{key}.device nvme is not supported: {_NVME[key]}"
    optimizer = parsed.offload_optimizer
    if optimizer is not None and optimizer.super_offload:
        yield (
            "offload_optimizer.super_offload is not supported: another process steps the weights then, which is not "
            "tested with methods that change them"
        )
    if optimizer is not None and optimizer.ratio < 1:
        yield (
            f"offload_optimizer.ratio {optimizer.ratio:g} is not supported: it keeps some masters on the GPU and some on "
            "the CPU, which is not tested with methods that change them"
        )
