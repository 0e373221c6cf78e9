"""The layouts of sharded weights that tests go through: ZeRO stages, precisions, offloading, tensor parallelism."""

from __future__ import annotations

from typing import Any


def zero(stage: int, **more: object) -> dict[str, Any]:
    """Return a case of a ZeRO stage with more options of DeepSpeed's section."""
    return {"zero": {"stage": stage, **more}}


def half(precision: str, stage: int) -> dict[str, Any]:
    """Return a case in half precision. Without ZeRO DeepSpeed can only accumulate in the precision of the weights."""
    return {"precision": precision, **zero(stage), **({} if stage else {"accumulate": precision})}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NOTHING_RESIDENT = {"stage3_param_persistence_threshold": 0}

# cases for any number of ranks
EVERYWHERE: dict[str, dict[str, Any]] = {
    **{f"zero{stage}_fp32": zero(stage) for stage in range(4)},
    **{f"zero{stage}_{precision}": half(precision, stage) for stage in range(4) for precision in ("bf16", "fp16")},
    **{f"zero{stage}_bf16_accumulated": {**half("bf16", stage), "accumulate": "bf16"} for stage in (1, 2, 3)},
    **{f"zero{stage}_offloaded": {**half("bf16", stage), **zero(stage, **OFFLOAD)} for stage in (1, 2, 3)},
    "zero3_fp32_offloaded": zero(3, **OFFLOAD),
    "zero3_all_offloaded": {**half("bf16", 3), **zero(3, **OFFLOAD, offload_param={"device": "cpu"})},
    "zero3_fp32_nothing_resident": zero(3, **NOTHING_RESIDENT),
    "zero3_bf16_nothing_resident": {**half("bf16", 3), **zero(3, **NOTHING_RESIDENT)},
    "zero3_sub_groups": zero(3, sub_group_size=2000),
    "zero3_bf16_sub_groups_offloaded": {**half("bf16", 3), **zero(3, sub_group_size=2000, **OFFLOAD)},
    "zero1_aligned": {**half("bf16", 1), **zero(1, parameter_alignment=True), "accumulate": "bf16"},
    "zero2_aligned": zero(2, parameter_alignment=True),
    "zero2_round_robin": {**zero(2, round_robin_gradients=True), "gathered": False},
    **{f"zero{stage}_tied": {**zero(stage), "tied": True} for stage in range(4)},
    "zero3_gpt2": {**half("bf16", 3), "family": "gpt2"},
    "zero1_gpt2": {**zero(1), "family": "gpt2"},
}

# cases of tensor-parallel ranks, and the model that so many can cut
SHAPE = {2: "six", 3: "six", 4: "four"}
CUT: dict[str, dict[str, Any]] = {
    **{f"fp32_zero{stage}": zero(stage) for stage in range(4)},
    **{f"bf16_zero{stage}": half("bf16", stage) for stage in (1, 2, 3)},
    **{f"fp16_zero{stage}": half("fp16", stage) for stage in (1, 2, 3)},
    "bf16_zero3_nothing_resident": {**half("bf16", 3), **zero(3, **NOTHING_RESIDENT)},
    "bf16_zero2_offloaded": {**half("bf16", 2), **zero(2, **OFFLOAD)},
    "fp32_zero3_tied": {**zero(3), "tied": True},
}


def cases(world: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return the cases of a world, (ranks, how many of them share a tensor-parallel cut), by name."""
    ranks, tensor = world
    if tensor > 1:
        return {
            name: {**case, "tensor": tensor, "shape": SHAPE[tensor], "gathered": False} for name, case in CUT.items()
        }
    found = EVERYWHERE | {f"{shape}_zero3": {**zero(3), "shape": shape} for shape in ("six", "four")}
    if ranks % 2 == 0:
        found["zero3_copy_within_nodes"] = {**half("bf16", 3), **zero(3, zero_hpz_partition_size=2)}
    for name in ("zero0_bf16", "zero0_fp16"):
        found[name] = {**found[name], "gathered": False}
    return found
