"""One rank of benchmarks/plan.py: a step of each run, and the bytes of its tensors by what they are; prints them as JSON."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.memory import kept_extra_bytes
from pretrain import quiet  # noqa: F401
from pretrain.config.schema import Config
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.planning.memory import kept_until_backward, states_of
from pretrain.planning.run_shape import shape_of
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.stepped_tensors import averaged_gradients, base_optimizer, stepped_tensors

SEQ_LEN, MICRO_BATCH_SIZE = 256, 2


def measure(case: dict[str, Any], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Return the predicted and the measured bytes of one rank of a run.

    Args:
        case: the keys of a run file that say its model, DeepSpeed file, layout and methods.
        ranks: this process and the others.
    """
    shape = shape_of(_config(case, ranks.world_size), ranks.world_size)
    engine = build_engine(shape.config, shape.model_config, shape.ds_config)
    weights = ShardedWeights(engine)
    initialize_weights(weights, shape.config, 0.02)
    length = SEQ_LEN // shape.config.parallel.sequence
    tokens = torch.arange(MICRO_BATCH_SIZE * length, device=engine.device).reshape(MICRO_BATCH_SIZE, length)

    def backward() -> None:
        engine.backward(engine(tokens, tokens)["total"])

    backward()
    engine.step()
    backward()
    recomputed = shape.config.activation_checkpointing != "off"
    return {
        "states": {"predicted": sum(states_of(shape).device.values()), "measured": _bytes(_states(engine, weights))},
        "kept": {"predicted": kept_until_backward(shape), "measured": _kept(engine, tokens, recomputed)},
    }


def _config(case: dict[str, Any], world_size: int) -> Config:
    parallel = case.get("parallel", {})
    data_ranks = world_size // (parallel.get("tensor", 1) * parallel.get("sequence", 1))
    data = {"train": "none", "seq_len": SEQ_LEN, "micro_batch_size": MICRO_BATCH_SIZE}
    data |= {"global_batch_size": MICRO_BATCH_SIZE * data_ranks}
    return Config.model_validate(
        {"name": "plan", "tokenizer": "none", "data": data, "steps": 2, "optim": {"lr": 1e-3}, **case}
    )


def _kept(engine: Engine, tokens: torch.Tensor, recomputed: bool) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, the last norm's output among them, without weights.

    Hooks of autograd see every tensor that is kept, except where blocks are recomputed: torch then keeps their inputs in
    closures. There the allocator says what is left. It would be wrong elsewhere, because what gloo's threads release is not
    counted.
    """
    if recomputed:
        return float(kept_extra_bytes(lambda: engine.module.base_model(input_ids=tokens, use_cache=False)))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        weights = {
            p.untyped_storage().data_ptr() for p in engine.module.parameters()
        }  # ZeRO-3 gathers them block by block
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = engine.module.base_model(input_ids=tokens, use_cache=False)
    return float(_bytes([*kept, output.last_hidden_state]))


def _states(engine: Engine, weights: ShardedWeights) -> Iterator[torch.Tensor]:
    """Yield the weights, masters, moments and averaged gradients, after a backward pass and before the step."""
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter).data
        if parameter.grad is not None:
            yield parameter.grad
    state = base_optimizer(weights).state
    for number, (flat, _) in enumerate(stepped_tensors(weights)):
        yield flat.data
        yield from averaged_gradients(weights, number, flat)
        yield from (value for value in state[flat].values() if torch.is_tensor(value) and value.numel() > 1)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all tensors together. Those that share memory count once."""
    held = list(tensors)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def main() -> None:
    ranks = initialize()
    for name, case in json.loads(sys.argv[1]).items():
        gc.collect()
        row = {"name": name, **measure(case, ranks)}
        if ranks.is_first:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
