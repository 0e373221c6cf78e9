"""The space that a checkpoint takes on disk."""

from __future__ import annotations

from pretrain.sharded.engine_protocol import Engine


def checkpoint_bytes(elements: int, *, half: bool) -> int:
    """Return the bytes of a checkpoint: masters, two Adam moments and working copies, which are fp32 unless `half`."""
    return elements * (14 if half else 16) + (1 << 20)


def checkpoint_bytes_of(engine: Engine) -> int:
    """Return the bytes of a checkpoint of `engine`, all ranks together."""
    return checkpoint_bytes(_elements(engine), half=engine.bfloat16_enabled() or engine.fp16_enabled())


def _elements(engine: Engine) -> int:
    """Count the elements in the files of one tensor-parallel group. Weights that are not cut count once for each rank."""
    mine = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return mine * max(1, engine.autotp_size())
