"""The space that a checkpoint takes on disk."""

from __future__ import annotations

from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.stepped_tensors import AVERAGE


def checkpoint_bytes(elements: int, *, half: bool, averaged: bool = False) -> int:
    """Return the bytes of a checkpoint: masters, two Adam moments and working copies, which are fp32 unless `half`.

    Args:
        elements: of all weights.
        half: the working copies are bf16 or fp16.
        averaged: an average of the weights is kept.
    """
    return elements * ((14 if half else 16) + (4 if averaged else 0)) + (1 << 20)


def checkpoint_bytes_of(engine: Engine) -> int:
    """Return the bytes of a checkpoint of `engine`, all ranks together."""
    half = engine.bfloat16_enabled() or engine.fp16_enabled()
    averaged = any(AVERAGE in state for state in engine.basic_optimizer.state.values())
    return checkpoint_bytes(_elements(engine), half=half, averaged=averaged)


def _elements(engine: Engine) -> int:
    """Count the elements in the files of one tensor-parallel group. Weights that are not cut count once for each rank."""
    mine = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return mine * max(1, engine.autotp_size())
