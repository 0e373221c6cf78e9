"""A rank that trains in one layout and saves, or loads another layout's checkpoint, shows its whole state, and trains on.

The state is put together by DeepSpeed's own functions, not by the code that loads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoints import Checkpoints, TrainerState
from pretrain.checkpoints.method_state import load_method_state, save_method_state
from pretrain.config.schema import CheckpointSection, Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.precision import precision_of
from pretrain.engine.tensor_parallel import data_rank
from pretrain.sharded import ShardedWeights
from pretrain.sharded.engine_protocol import Engine
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import VOCABULARY, forget_garbage, leave, share, tiny_config, tiny_plan, tokens

BEFORE, AFTER = 3, 20  # steps before the checkpoint, and after it
SEQUENCES, LR = 12, 5e-3
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
_ADAM = ("exp_avg", "exp_avg_sq")

Layout = dict[str, Any]  # deepspeed, tensor, optim, methods


def config_of(case: Layout) -> Config:
    methods = [{"name": "lir"}, {"name": "tvr", "target_std": 0.01, "interval_steps": 2, "ratio_threshold": 1.1}]
    return tiny_config(
        case,
        model=SIZES,
        sequences=SEQUENCES,
        micro_batch_size=1,
        steps=BEFORE + AFTER,
        optim={"lr": LR, **case.get("optim", {})},
        methods=case.get("methods", methods),
    )


def train(engine: Engine, weights: ShardedWeights, config: Config, ranks: Ranks, first: int, last: int) -> list[float]:
    """Take steps `first` to `last`; return the mean loss of each over all ranks."""
    losses = []
    for step in range(first, last + 1):
        for group in engine.optimizer.param_groups:
            group["lr"] = config.optim.lr * group.get("lr_scale", 1.0)
        parts = []
        for micro_batch in share(MicroBatch(tokens(step, SEQUENCES)), config, ranks):
            loss = engine(micro_batch.inputs, micro_batch.targets, divisor=None)["total"]
            engine.backward(loss)
            engine.step()
            parts.append(loss.detach())
        mean = torch.stack(parts).mean()
        dist.all_reduce(mean)
        losses.append(float(mean) / ranks.world_size)
        for method in config.methods:
            method.after_step(step, weights)
    return losses


def whole_state(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Return the full master and moments of each weight by name, as DeepSpeed puts them together. Collective."""
    return {
        name: {key: _of_all_slices(parameter, local) for key, local in found}
        for name, parameter, found in _of_this_slice(engine)
    }


def _of_this_slice(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, list[tuple[str, torch.Tensor]]]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    optimizer = engine.optimizer
    masters = {}
    if engine.zero_optimization_stage() == 0:
        groups = [(group["params"], group["params"]) for group in optimizer.param_groups]
        if hasattr(optimizer, "fp32_groups"):
            groups = list(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True))
        masters = {id(mine): master for some, others in groups for mine, master in zip(some, others, strict=True)}
    base = getattr(optimizer, "optimizer", optimizer)
    groups_of_parameters = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", [])
    for parameters, group in zip(groups_of_parameters, base.param_groups, strict=False):  # as at DeepSpeed's first step
        lazy_init_hp_params_optimizer_state(parameters, group["params"][0], base.state)
    for name, parameter in engine.module.named_parameters():
        if masters:
            master = masters[id(parameter)]
            found = [
                ("master", master),
                *((key, base.state[master][key]) for key in base.state[master] if key != "step"),
            ]
        else:
            found = [("master", safe_get_full_fp32_param(parameter))]
            held = [key for key in _ADAM if any(key in state for state in base.state.values())]
            keys = ["momentum_buffer"] if getattr(parameter, "use_muon", False) else held
            if (
                not hasattr(parameter, "use_muon") or engine.zero_optimization_stage() == 3
            ):  # below, DeepSpeed finds none
                found += [(key, safe_get_full_optimizer_state(parameter, key)) for key in keys]
        yield name, parameter, [(key, tensor.detach().float().clone()) for key, tensor in found]


def _of_all_slices(parameter: torch.nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    meta = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, local)
    if not meta or meta["replicated"] or meta["partition_dim"] is None:
        return local
    shape = list(meta["logical_shape"])
    shape[meta["partition_dim"]] = -1
    cut = [each.view(shape) for each in everyones[: len(meta["partition_sizes"])]]
    return torch.cat(cut, meta["partition_dim"])


def examine(case: Layout, folder: Path, source: Path | None, ranks: Ranks) -> dict[str, Any]:
    plan = tiny_plan(config_of(case))
    config, engine = plan.config, build_engine(plan.config, plan.model_config, plan.ds_config)
    weights = ShardedWeights(engine)
    checkpoints = Checkpoints(folder, CheckpointSection(resume=str(source)), ranks, print)
    stage = plan.ds_config["zero_optimization"].get("stage", 0)
    state = TrainerState(
        *(
            BEFORE,
            BEFORE * SEQUENCES,
            ranks.world_size,
            stage,
            precision_of(plan.ds_config),
            {},
            "",
            "",
            0,
            16,
            SEQUENCES,
        ),
        tensor_parallel=case.get("tensor", 1),
        optimizer=config.optim.name,
    )
    if source is None:
        initialize_weights(weights, config, 0.02)
        for method in config.methods:
            method.prepare(weights)
        train(engine, weights, config, ranks, 1, BEFORE)
        checkpoints.save(engine, state, lambda path: save_method_state(path, config.methods, engine.module))
    else:
        found = checkpoints.find()
        assert found is not None
        checkpoints.load(found, engine, state)
        load_method_state(found, config.methods, engine.module)
        for method in config.methods:
            method.prepare(weights)
    whole = whole_state(engine)
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(whole, folder / "state.pt")
    rest = {"steps": engine.global_steps, "samples": engine.global_samples, "draw": float(torch.rand(()))}
    return {
        "losses": train(engine, weights, config, ranks, BEFORE + 1, BEFORE + AFTER),
        "data rank": data_rank(config, ranks.rank),
        **rest,
    }


def examine_all(cases: dict[str, tuple[Layout, Path | None]], out: Path) -> None:
    """Be a rank. Each case has a layout and the checkpoint to load, None to begin; results go to the folder `out`."""
    allow_fp16_on_cpu()
    ranks = initialize()
    for name, (case, source) in cases.items():
        found = examine(case, out / name, source, ranks)
        (out / name / f"found_{ranks.rank}.json").write_text(json.dumps(found))
        forget_garbage()
    leave()
