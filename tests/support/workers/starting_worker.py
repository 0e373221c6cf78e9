"""A rank that starts from a model in each case, and shows what its engine then holds and computes.

Masters and working copies are put together by DeepSpeed's own functions, not by the code that loads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pretrain.checkpoints.logit_probe import probe_logits
from pretrain.checkpoints.stored import safetensors_weights
from pretrain.config.schema import Config
from pretrain.data import load_tokenizer
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.build_engine import build_engine
from pretrain.engine.build_model import hf_config, outline
from pretrain.engine.initialize import initial_draw
from pretrain.errors import UserError
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.sharded import ShardedWeights
from pretrain.sharded.draws import Constant
from pretrain.sharded.engine_protocol import Engine
from pretrain.starting import model_of, start_from, starting_point
from pretrain.starting.start import read_into
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import forget_garbage, leave, tiny_config, tiny_plan, tiny_tokenizer, tokens
from tests.support.workers.elastic_worker import _of_all_slices


def config_of(case: dict[str, Any]) -> Config:
    """Return the run of a case: {model, deepspeed, tensor, methods, warm_start, seed}, and {tokenizer, tokens, forward}."""
    more = {key: case[key] for key in ("warm_start", "seed") if key in case}
    return tiny_config(
        case,
        model=case["model"],
        sequences=4,
        micro_batch_size=1,
        steps=3,
        optim={"lr": 1e-3},
        methods=case.get("methods", []),
        **more,
    )


def whole_masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Return the full master of each weight by name, as DeepSpeed puts it together. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters: dict[int, torch.Tensor] = {}
    if engine.zero_optimization_stage() == 0:
        for group in zip(
            getattr(engine.optimizer, "fp16_groups", None) or [g["params"] for g in engine.optimizer.param_groups],
            getattr(engine.optimizer, "fp32_groups", None) or [g["params"] for g in engine.optimizer.param_groups],
            strict=True,
        ):
            masters |= {id(mine): master for mine, master in zip(*group, strict=True)}
    return {
        name: _of_all_slices(
            parameter, (masters[id(parameter)] if masters else safe_get_full_fp32_param(parameter)).detach().clone()
        )
        for name, parameter in engine.module.named_parameters()
    }


def whole_working_copies(engine: Engine) -> dict[str, torch.Tensor]:
    """Return what forward reads of each weight, in full. Collective."""
    return {name: _of_all_slices(parameter, full) for name, parameter, full in _gathered(engine)}


def _gathered(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter, parameter.detach().clone()
        else:
            yield name, parameter, parameter.detach().clone()


def examine(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return masters, working copies and logits, or the sentence of a refusal. Collective."""
    tokenizer = load_tokenizer(case["tokenizer"]) if "tokenizer" in case else tiny_tokenizer()
    try:
        config = model_of(config_of(case))
        bare = config.model_copy(update={"methods": ()})
        plain = outline(bare, hf_config(bare, tokenizer))
        plan = tiny_plan(config)
        weights = outline(plan.config, plan.model_config)
        point = starting_point(plan.config, tokenizer, weights, plain, case.get("forward", ""))
    except (UserError, ValidationError) as error:
        return {"refused": str(error)}
    engine = build_engine(plan.config, plan.model_config, plan.ds_config)
    sharded = ShardedWeights(engine)
    rule = partial(initial_draw, config=plan.config, default_std=0.02)
    try:
        start_from(point, sharded, plan.config, rule, ranks)
    except UserError as error:
        return {"refused": str(error)}
    for method in plan.config.methods:
        method.prepare(sharded)
    ids = torch.tensor(case["tokens"]) if "tokens" in case else tokens(1, 2)[:, :-1]
    logits, loss = probe_logits(engine.module, ids), None
    if config.parallel.sequence == 1:  # else each rank would have a slice of the sequences
        loss = float(engine(ids[:, :-1], ids[:, 1:], divisor=None)[CROSS_ENTROPY])  # as training computes it
    return {
        "masters": whole_masters(engine),
        "working": whole_working_copies(engine),
        "logits": logits,
        "loss": loss,
    }


def examine_all(cases: dict[str, dict[str, Any]], out: Path) -> None:
    """Be a rank that goes through all cases. Results go to the folder `out`, those of rank 0."""
    allow_fp16_on_cpu()
    ranks = initialize()
    out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases.values()):
        found = examine(case, ranks)
        if ranks.is_first:
            torch.save(found, out / f"{number}.pt")
        forget_garbage()
    if ranks.is_first:
        (out / "names.json").write_text(json.dumps(list(cases)))
    leave()


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return what was found in each case, by name."""
    names = json.loads((out / "names.json").read_text())
    return {name: torch.load(out / f"{number}.pt") for number, name in enumerate(names)}


def measure_reading(folder: Path, out: Path) -> None:
    """Be a rank that reads a model into an engine, and write how many bytes its memory grew by while it did."""
    ranks = initialize()
    case = {"deepspeed": {"zero_optimization": {"stage": 3}}, "model": {"family": "llama", "init_from": str(folder)}}
    plan = tiny_plan(model_of(config_of(case)))
    engine = build_engine(plan.config, plan.model_config, plan.ds_config)
    weights, stored = ShardedWeights(engine), safetensors_weights(folder)
    weights.fill_(0, lambda weight: Constant(0.0))  # all memory of the engine is in use
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _memory("VmRSS")
    read_into(weights, stored)
    grown = _memory("VmHWM") - before
    largest = max(tensor.parts[0].span.count * 4 for tensor in stored.values())
    (out / f"{ranks.rank}.json").write_text(json.dumps({"grown": grown, "largest weight": largest}))
    leave()


def _memory(field: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return 1024 * int(line.split()[1])
