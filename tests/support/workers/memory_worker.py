"""A rank that trains a step in each layout and counts the bytes of the tensors that it holds, by what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_model import outline
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.planning.memory import activation_bytes, states_of
from pretrain.planning.run_shape import RunShape
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.stepped_tensors import averaged_gradients, base_optimizer, stepped_tensors
from tests.support.tiny_engines import forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens

SEQUENCES = 4
MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def run_config(case: dict[str, Any]) -> Config:
    """Return the run of a case: {deepspeed, tensor, activation_checkpointing}."""
    return tiny_config(
        case,
        model={**MODEL, "num_key_value_heads": 2},
        sequences=SEQUENCES,
        micro_batch_size=SEQUENCES // 2,
        steps=3,
        optim={"lr": 1e-3},
        methods=[],
        activation_checkpointing=case.get("activation_checkpointing", "off"),
    )


def measure(case: dict[str, Any], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Return the predicted and the counted bytes of one rank."""
    plan = tiny_plan(run_config(case))
    shape = RunShape(
        plan.config, ranks.world_size, plan.model_config, plan.ds_config, outline(plan.config, plan.model_config)
    )
    gate = gated(plan)
    weights = ShardedWeights(gate.engine)
    initialize_weights(weights, plan.config, 0.02)
    train_step(gate, 1, share(MicroBatch(tokens(1, SEQUENCES)), plan.config, ranks), 1e-3, ranks, masked=False)
    batch = share(MicroBatch(tokens(2, SEQUENCES)), plan.config, ranks)[0]
    gate.engine.backward(gate.engine(batch.inputs, batch.targets)["total"])
    found = {"states": float(_bytes(_states(gate.engine, weights)))}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in gate.engine.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gate.engine.module.base_model(input_ids=batch.inputs, use_cache=False)
    found["activations"] = float(_bytes(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own))
    predicted = {"states": sum(states_of(shape).device.values()), "activations": activation_bytes(shape)}
    return {"predicted": predicted, "found": found}


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


def measure_all(cases: dict[str, dict[str, Any]], out: Path) -> None:
    """Be a rank: `found.json` in the folder `out` gets the figures of each case."""
    ranks = initialize()
    found = {}
    for name, case in cases.items():
        forget_garbage()
        found[name] = measure(case, ranks)
    if ranks.is_first:
        (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    leave()
