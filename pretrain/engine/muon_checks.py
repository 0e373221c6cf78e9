"""Checks of a DeepSpeed configuration for a run with Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.config.schema import Config
from pretrain.engine.precision import precision_of
from pretrain.errors import UserError


def zero_for_muon(config: Config, zero: dict[str, Any], blocks: dict[str, Any], source: str) -> dict[str, Any]:
    """Return DeepSpeed's zero_optimization block for a run with Muon: `zero`, and the keys that Muon needs.

    Args:
        config: the run.
        zero: the user's block.
        blocks: the complete blocks of the precision, from `precision_blocks`.
        source: a name of the DeepSpeed configuration for messages.

    Raises:
        UserError: DeepSpeed's Muon would differ from its formula in this run.
    """
    for complaint in _complaints(config, zero, blocks):
        raise UserError(f"{source}: {complaint}.")
    return {**zero, "reduce_scatter": False}


def _complaints(config: Config, zero: dict[str, Any], blocks: dict[str, Any]) -> Iterator[str]:
    stage, precision = zero.get("stage", 0), precision_of(blocks)
    if config.parallel.tensor > 1:
        yield (
            f"optim.name muon with parallel.tensor {config.parallel.tensor} is not supported: each rank would "
            "orthogonalize its own slice of a matrix instead of the matrix"
        )
    if precision == "fp16":
        yield (
            "optim.name muon with fp16 is not supported: DeepSpeed keeps the momentum at the loss scale, so it is wrong "
            "when the scale changes. Use bf16 with ZeRO stage 1 or 3, or fp32"
        )
    if precision == "bf16" and (stage in (0, 2) or blocks["data_types"]["grad_accum_dtype"] != "fp32"):
        where = f"at ZeRO stage {stage}" if stage in (0, 2) else 'with data_types.grad_accum_dtype "bf16"'
        yield (
            f"optim.name muon needs gradients and momentum in fp32, which DeepSpeed rounds to bf16 {where}: "
            "orthogonalizing makes that a large error. Use ZeRO stage 1 or 3 and accumulate in fp32"
        )
    if zero.get("reduce_scatter"):
        yield (
            "optim.name muon needs zero_optimization.reduce_scatter false: with it DeepSpeed refuses stage 3, and loses "
            "gradients of what AdamW steps in half precision below. Leave the key out"
        )
