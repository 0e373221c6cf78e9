"""The precision of a run: fp32, bf16 or fp16 working copies with fp32 masters, in the combinations DeepSpeed can run.

    precision    ZeRO-1, 2, 3: gradients accumulate in    stage 0: gradients accumulate in
    fp32         fp32                                     fp32
    bf16         fp32, or bf16 if the file says so        bf16, which the file must say
    fp16         fp32                                     fp16, which the file must say

DeepSpeed refuses any other combination with an exception of its own, or accepts it untested.
"""

from __future__ import annotations

from typing import Any

from pretrain.engine.deepspeed_blocks import block, parse
from pretrain.errors import UserError

_ACCUMULATION = {"fp32": {"fp32"}, "bf16": {"fp32", "bf16"}, "fp16": {"fp32"}}

# Bounds of fp16's loss scale. DeepSpeed accepts any number, and beyond these its scale never settles.
_LEAST = {"loss_scale": 0, "initial_scale_power": 0, "loss_scale_window": 1, "hysteresis": 1, "min_loss_scale": 1}
_MOST = {"loss_scale": 2.0**127, "initial_scale_power": 127}  # the loss is scaled in float32


def precision_of(ds_config: dict[str, Any]) -> str:
    """Return fp32, bf16 or fp16, from a complete DeepSpeed configuration."""
    return next((name for name in ("bf16", "fp16") if ds_config[name]["enabled"]), "fp32")


def precision_blocks(given: dict[str, Any], source: str, stage: int) -> dict[str, Any]:
    """Return the complete blocks bf16, fp16 and data_types of the user's JSON.

    Args:
        given: the JSON's content.
        source: a name of the JSON for messages.
        stage: the ZeRO stage.

    Raises:
        UserError: a combination that DeepSpeed cannot run or that is not tested.
    """
    blocks = {
        "bf16": _bf16(block(given, "bf16", source), source),
        "fp16": _fp16(block(given, "fp16", source), source),
        "data_types": {"grad_accum_dtype": "fp32", **block(given, "data_types", source)},
    }
    if unknown := blocks["data_types"].keys() - {"grad_accum_dtype"}:
        raise UserError(f"{source}: unknown key 'data_types.{min(unknown)}'; known is: grad_accum_dtype.")
    if blocks["bf16"]["enabled"] and blocks["fp16"]["enabled"]:
        raise UserError(f"{source} enables both bf16 and fp16. Choose one.")
    _check_accumulation(precision_of(blocks), blocks["data_types"]["grad_accum_dtype"], stage, source)
    return blocks


def check_accelerator(ds_config: dict[str, Any]) -> None:
    """Raise UserError if this machine cannot train in the precision of the run. Needs no process group."""
    from deepspeed.accelerator import get_accelerator

    accelerator, precision = get_accelerator(), precision_of(ds_config)
    supported = {
        "fp32": lambda: True,
        "bf16": accelerator.is_bf16_supported,
        "fp16": accelerator.is_fp16_supported,
    }
    if not supported[precision]():
        raise UserError(
            f"the DeepSpeed file asks for {precision}, but DeepSpeed cannot train in {precision} on this machine's "
            f"{accelerator.device_name()}. Use another machine or another precision."
        )


def _bf16(content: dict[str, Any], source: str) -> dict[str, Any]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    complete = {"enabled": False, "check_grad_overflow": False, **content}
    parsed = parse(DeepSpeedBF16Config, complete, "bf16", source)
    _check_enabled("bf16", complete, source)
    if parsed.bf16_master_weights_and_grads:
        raise UserError(f"{source}: bf16.bf16_master_weights_and_grads is not supported: the master weights are fp32.")
    return complete


def _fp16(content: dict[str, Any], source: str) -> dict[str, Any]:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    complete = {
        "enabled": False,
        "loss_scale": 0,
        "auto_cast": False,
        "fp16_master_weights_and_grads": False,
        **content,
    }
    parsed = parse(DeepSpeedFP16Config, complete, "fp16", source)
    _check_enabled("fp16", complete, source)
    for key, least in _LEAST.items():
        if getattr(parsed, key) < least:
            raise UserError(f"{source}: fp16.{key} must be {least} or more, not {getattr(parsed, key)}.")
    for key, most in _MOST.items():
        if getattr(parsed, key) > most:
            raise UserError(f"{source}: fp16.{key} must be {most:g} or less, not {getattr(parsed, key):g}.")
    if parsed.fp16_master_weights_and_grads:
        raise UserError(f"{source}: fp16.fp16_master_weights_and_grads is not supported: the master weights are fp32.")
    return complete


def _check_enabled(name: str, content: dict[str, Any], source: str) -> None:
    if not isinstance(content["enabled"], bool):  # DeepSpeed reads "auto" as its own default
        raise UserError(
            f"{source}: {name}.enabled must be true or false: the run file has no key that it could follow."
        )


def _check_accumulation(precision: str, accumulation: Any, stage: int, source: str) -> None:
    allowed = {precision} if stage == 0 else _ACCUMULATION[precision]
    if accumulation in allowed:
        return
    way_out = "use ZeRO stage 1" if stage == 0 and precision != "fp32" else "leave it out"
    chosen = " or ".join(f'"{name}"' for name in sorted(allowed))
    raise UserError(
        f"{source}: gradients of {precision} weights at ZeRO stage {stage} cannot accumulate in {accumulation}. "
        f"Set data_types.grad_accum_dtype to {chosen}, or {way_out}."
    )
