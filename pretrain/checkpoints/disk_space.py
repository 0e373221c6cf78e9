"""The space that a checkpoint takes on disk."""

from __future__ import annotations

from pretrain.model.layout import describe_model
from pretrain.optimizers import OPTIMIZERS, algorithm_of
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.stepped_tensors import AVERAGE


def checkpoint_bytes(elements: int, moments: int, *, half: bool) -> int:
    """Return the bytes of a checkpoint.

    Args:
        elements: of all weights. Each has a master and a working copy.
        moments: the bytes of the optimizer's moments, and of the average of the weights if one is kept.
        half: whether the working copies are in half precision.
    """
    return elements * (6 if half else 8) + moments + (1 << 20)


def checkpoint_bytes_of(engine: Engine) -> int:
    """Return the bytes of a checkpoint of `engine`, all ranks together.

    Weights that tensor parallelism does not cut count once for each rank. An optimizer that has no file in
    `pretrain/optimizers/` is taken to keep as much as AdamW.
    """
    optimizer = algorithm_of(engine.basic_optimizer) or OPTIMIZERS["adamw"]
    weights = {weight.name: weight for weight in describe_model(engine.module)}
    elements = moments = 0
    for name, parameter in engine.module.named_parameters():
        size = max(1, engine.autotp_size()) * getattr(parameter, "ds_numel", parameter.numel())
        elements, moments = elements + size, moments + size * optimizer.bytes_of(weights[name])
    if any(AVERAGE in state for state in engine.basic_optimizer.state.values()):
        moments += 4 * elements
    return checkpoint_bytes(elements, moments, half=engine.bfloat16_enabled() or engine.fp16_enabled())
