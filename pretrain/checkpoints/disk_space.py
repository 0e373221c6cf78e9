"""What a checkpoint takes on disk."""

from __future__ import annotations

from pretrain.sharded.engine_protocol import Engine


def checkpoint_bytes(elements: int, *, half: bool) -> int:
    """Master, two Adam moments, and the working copy in half precision or fp32."""
    return elements * (14 if half else 16) + (1 << 20)


def bytes_of(engine: Engine) -> int:
    """Of a checkpoint of `engine`, all ranks together."""
    return checkpoint_bytes(_elements(engine), half=engine.bfloat16_enabled() or engine.fp16_enabled())


def _elements(engine: Engine) -> int:
    """Elements that the ranks of one tensor-parallel group hold together: each stores what is whole on all of them."""
    mine = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return mine * max(1, engine.autotp_size())
