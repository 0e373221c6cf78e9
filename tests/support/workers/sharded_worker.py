"""A rank that builds engines for many cases (stage, precision, threshold) and writes down what it measures.

Every dense value here is read through DeepSpeed's own public API, not through `pretrain.sharded`, and every expected
value is computed densely in float64 or float32 by numpy and torch.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain import quiet  # noqa: F401
from pretrain.config.data_section import DataSection
from pretrain.config.schema import Config
from pretrain.distributed.ranks import initialize
from pretrain.engine.build_model import bind_methods, build_model, hf_config
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.initialize import initialize_weights
from pretrain.model.layout import Weight
from pretrain.optim.param_groups import build_optimizer
from pretrain.sharded import GatheredWeights, ShardedWeights, gathered
from pretrain.sharded.draws import Constant
from pretrain.sharded.engine_protocol import Engine
from tests.support.arrays import save_arrays
from tests.support.runs import allow_fp16_on_cpu
from tests.support.tiny_engines import VOCABULARY, forget_garbage, leave, tiny_tokenizer

# 37 is odd and prime, so no world size divides the weights and every last partition is padded; the others can be cut
# by tensor parallelism, which wants heads and intermediate sizes that it divides
SHAPES = {
    "odd": {"hidden_size": 37, "intermediate_size": 77, "num_attention_heads": 1, "head_dim": 6},
    "six": {"hidden_size": 42, "intermediate_size": 78, "num_attention_heads": 6, "head_dim": 2},
    "four": {"hidden_size": 44, "intermediate_size": 76, "num_attention_heads": 4, "head_dim": 2},
    # DeepSpeed swaps out no sub-group below 1 MB
    "large": {"hidden_size": 187, "intermediate_size": 701, "num_attention_heads": 1, "head_dim": 6},
}


def run_config(case: dict) -> Config:
    """Return the run of a case: {zero, precision, family, shape, layers, tied, tensor, accumulate, methods}."""
    layers = case.get("layers", 1)
    llama = {"family": "llama", "num_hidden_layers": layers} | SHAPES[case.get("shape", "odd")]
    llama |= {"tie_word_embeddings": case.get("tied", False)}
    gpt2 = {"family": "gpt2", "n_embd": 36, "n_layer": layers, "n_head": 2, "n_inner": 55}
    gpt2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    precision, accumulate = case.get("precision", "fp32"), case.get("accumulate")
    deepspeed = {"zero_optimization": case["zero"]}
    deepspeed |= {precision: {"enabled": True}} if precision != "fp32" else {}
    if precision == "fp16":
        deepspeed["fp16"]["loss_scale"] = 64  # no step is skipped while a dynamic scale finds its place
    deepspeed |= {"data_types": {"grad_accum_dtype": accumulate}} if accumulate else {}
    tensor = case.get("tensor", 1)
    config = Config.model_validate(
        {
            "name": "case",
            "model": gpt2 if case.get("family") == "gpt2" else llama,
            "tokenizer": "none",
            "data": {
                "train": "none",
                "seq_len": 16,
                "global_batch_size": 12,
                "micro_batch_size": 12 // (dist.get_world_size() // tensor),
            },
            "steps": 10,
            "optim": {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-6},
            "methods": case.get("methods", []),
            "parallel": {"tensor": tensor},
            "deepspeed": deepspeed,
        }
    )
    return bind_methods(config, hf_config(config, tiny_tokenizer()))


def accumulating(data: DataSection) -> DataSection:
    """Return the same batch in micro-batches of one, so that an optimizer step takes several."""
    return data.model_copy(update={"micro_batch_size": 1})


def build(config: Config, nvme_path: str | None = None) -> tuple[Engine, ShardedWeights]:
    import deepspeed

    ds_config = deepspeed_config(config, dist.get_world_size())
    if nvme_path is not None:  # the trainer refuses it because DeepSpeed cannot resume from there
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": nvme_path}
    model_config = hf_config(config, tiny_tokenizer())
    model = build_model(config, model_config, ds_config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config), config=ds_config)
    weights = ShardedWeights(engine)
    initialize_weights(weights, config, model_config.initializer_range)
    return engine, weights


def whole(parameter: torch.nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    """Return the full weight from the tensor-parallel slices of all ranks."""
    from deepspeed.utils import groups

    notes = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    if not notes or notes["partition_dim"] is None:
        return local
    group = groups.get_tensor_model_parallel_group()
    slices: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(slices, local, group=group)
    return torch.cat(slices, notes["partition_dim"])


def masters(engine: Engine) -> dict[str, np.ndarray]:
    """Return every full fp32 weight, by DeepSpeed's API."""
    from deepspeed.utils import safe_get_full_fp32_param

    if getattr(engine.optimizer, "round_robin_gradients", False):
        # the API reads the wrong ranges there; in fp32 the working copies are what the masters were at the last refresh
        return {name: copy.float().numpy().copy() for name, copy in working_copies(engine).items()}
    # half precision without ZeRO: the API has no master there
    unfused: dict[int, torch.Tensor] = {}
    if hasattr(engine.optimizer, "fp32_groups"):
        for parameters, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            unfused |= {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    found = {}
    for name, parameter in engine.module.named_parameters():
        full = unfused.get(id(parameter))
        full = safe_get_full_fp32_param(parameter) if full is None else full
        full = (parameter.data if full is None else full).detach().float().cpu()
        found[name] = whole(parameter, full).numpy().copy()
    return found


def working_copies(engine: Engine) -> dict[str, torch.Tensor]:
    """Return every full weight as forward reads it: the resident copy where there is one, else the gathered partitions."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = whole(parameter, parameter.data.detach().clone().cpu())
    return found


def step(engine: Engine, seed: int, lr: float) -> float:
    tokens = torch.randint(0, VOCABULARY, (12, 17), generator=torch.Generator().manual_seed(seed))
    readers = dist.get_world_size(engine.data_parallel_group)
    share, reader = 12 // readers, dist.get_rank(engine.data_parallel_group)
    mine = tokens[reader * share : (reader + 1) * share]
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    loss = engine(mine[:, :-1], mine[:, 1:])["total"]
    engine.backward(loss)
    engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total / dist.get_world_size())


@torch.no_grad()
def validation_loss(engine: Engine) -> float:
    """Return the loss of one fixed batch, the same on every rank: a forward that no backward follows."""
    engine.eval()
    tokens = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(99))
    loss = float(engine(tokens[:, :-1], tokens[:, 1:])["total"])
    engine.train()
    return loss


def kurtosis(values: np.ndarray) -> float:
    away = values.astype(np.float64) - values.astype(np.float64).mean()
    return float((away**4).mean() / (away**2).mean() ** 2)


def largest(values: Iterable[float]) -> float:
    return float(np.max([float(value) for value in values]))  # NaN is the largest, unlike for max()


def examine(config: Config, case: dict) -> dict:
    engine, weights = build(config, case.get("nvme_path"))
    assert "nvme_path" not in case or engine.optimizer._swappable_optimizer_subgroup(0)
    start = masters(engine)
    seen: dict = {"digest": hashlib.sha256(b"".join(start[n].tobytes() for n in sorted(start))).hexdigest()}
    _, seen["working_filled"] = _compare(engine, {})

    moments = weights.moments()
    seen["std_error"] = largest(
        abs(moments[n].std / w.astype(np.float64).std(ddof=1) - 1) for n, w in start.items() if w.std() > 0
    )
    seen["mean_error"] = largest(
        abs(moments[n].mean - w.astype(np.float64).mean()) / np.abs(w).max() for n, w in start.items() if w.std() > 0
    )
    seen["constants_exact"] = all(
        (moments[n].std, moments[n].mean) == (0.0, float(w.flat[0])) for n, w in start.items() if w.std() == 0
    )
    seen["counts_right"] = all(moments[n].count == w.size for n, w in start.items())
    statistics = weights.statistics()
    seen["kurtosis_error"] = largest(
        abs(statistics[n].kurtosis / kurtosis(w) - 1) for n, w in start.items() if w.std() > 0
    )
    seen["maximum_exact"] = all(statistics[n].absolute_maximum == np.abs(w).max() for n, w in start.items())
    seen["statistics_agree"] = all(statistics[n].std == moments[n].std for n in start)

    before = weights.snapshot()
    step(engine, 0, 1e-3)
    trained = masters(engine)
    changes = weights.squared_change(before)
    seen["change_error"] = largest(
        abs(changes[n] / np.square(trained[n].astype(np.float64) - start[n].astype(np.float64)).sum() - 1)
        for n in start
        if np.any(trained[n] != start[n])
    )

    chosen = list(weights.layout)
    scale, shift = 0.37, 0.011
    losses = [validation_loss(engine)]  # leaves large weights whole under ZeRO-3
    weights.rescale_({name: (scale, shift) for name in chosen})
    losses.append(validation_loss(engine))
    expected = {n: torch.from_numpy(w).mul(scale).add(shift).numpy() for n, w in trained.items()}
    seen["rescale_exact"], seen["working_follows"] = _compare(engine, expected)
    step(engine, 1, 0.0)
    seen["survives_step"], seen["working_follows_after_step"] = _compare(engine, expected)
    losses.append(validation_loss(engine))
    seen["losses"] = losses

    if case.get("gathered", True):
        seen |= compare_with_gathered(engine, weights, chosen, expected)
    edited = masters(engine)
    shapes_right = True
    validation_loss(engine)
    for name, full in gathered(weights, chosen):
        shapes_right &= full.shape == edited[name].shape and np.array_equal(full.numpy(), edited[name])
        full[0] += 1.0
        edited[name][0] += np.float32(1.0)
    seen["hook_saw_the_full_weight"] = shapes_right
    seen["hook_exact"], seen["hook_working_follows"] = _compare(engine, edited)
    for name, full in gathered(weights, chosen):
        full[0] += 1.0
        edited[name][0] += np.float32(1.0)
        break
    seen["hook_left_early"], seen["hook_left_early_working_follows"] = _compare(engine, edited)
    step(engine, 3, 0.0)
    seen["hook_survives"], seen["hook_working_follows_after_step"] = _compare(engine, edited)
    return seen | center(engine, weights)


def center(engine: Engine, weights: ShardedWeights) -> dict:
    """Centre the rows of the head, which leaves the probabilities, and then those of every weight."""
    head, seen = "lm_head.weight", {}
    if head in weights.layout:
        weights.rescale_({head: (1.0, 0.02)})  # a mean that shows in the logits
        before = validation_logits(engine)
        weights.center_rows_([head])
        after = validation_logits(engine)
        seen["logits_moved"] = float((after - before).abs().max())
        seen["probabilities_moved"] = float((after.log_softmax(-1) - before.log_softmax(-1)).abs().max())
    expected = {name: centered(values) for name, values in masters(engine).items()}
    weights.center_rows_(weights.layout)
    seen["centered_exact"], seen["centered_working_follows"] = _compare(engine, expected)
    step(engine, 4, 0.0)
    seen["centered_survives"], seen["centered_working_follows_after_step"] = _compare(engine, expected)
    return seen


def centered(values: np.ndarray) -> np.ndarray:
    """Subtract the mean row, or a vector's mean, which is computed in float64."""
    return values - values.astype(np.float64).mean(0).astype(np.float32)


@torch.no_grad()
def validation_logits(engine: Engine) -> torch.Tensor:
    """Return the logits of one fixed batch, float64: a forward that no backward follows."""
    engine.eval()
    tokens = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(98))
    output: Any = engine(tokens, use_cache=False)  # no targets: the model's own output instead of losses
    engine.train()
    return output.logits.double().cpu()


def compare_with_gathered(engine: Engine, weights: ShardedWeights, chosen: list[str], expected: dict) -> dict:
    seen: dict = {}
    simple = GatheredWeights(engine)
    sharded_moments, gathered_moments = weights.moments(chosen), simple.moments(chosen)
    seen["engines_agree_on_std"] = largest(abs(sharded_moments[n].std / gathered_moments[n].std - 1) for n in chosen)
    simple.rescale_({name: (1.9, -0.003) for name in chosen})
    by_gathered = {n: torch.from_numpy(expected[n]).mul(1.9).add(-0.003).numpy() for n in chosen}
    seen["gathered_exact"], _ = _compare(engine, by_gathered)
    step(engine, 2, 0.0)
    seen["gathered_survives"], seen["gathered_working_follows"] = _compare(engine, by_gathered)
    return seen


def misuse(config: Config) -> dict[str, str]:
    """Return the exception of each bad call on this rank; the weights must not have changed."""
    engine, weights = build(config)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    last = dist.get_rank() == dist.get_world_size() - 1

    def constant(weight: Weight) -> Constant:
        return Constant(0.0)

    calls = {
        "unknown weight": lambda: weights.moments([name.replace("up", "upp")]),
        "unknown weight on one rank": lambda: weights.moments([name + "x"] if last else [name]),
        "factor too large": lambda: weights.rescale_({name: (1e300, 0.0)}),
        "unknown piece": lambda: weights.pieces([name + "x"]),
        "factor not finite": lambda: weights.rescale_({name: (float("nan"), 0.0)}),
    }
    if dist.get_world_size() > 1:
        calls["different lists"] = lambda: weights.moments([name, other] if last else [name])
        calls["different calls"] = lambda: weights.rescale_({name: (0.5, 0.0)}) if last else weights.moments([name])
        calls["different seeds"] = lambda: weights.fill_(int(last), lambda weight: Constant(0.0))
        calls["different weights to fill"] = lambda: weights.fill_(0, constant, [name + "x" if last else name])
        calls["different shrinking"] = lambda: weights.perturb_(0, 0.5 if last else 0.25, constant, [name])
        calls["different factors"] = lambda: weights.rescale_({name: (0.5 if last else 0.25, 0.0)})
    before, raised = masters(engine), {}
    for name_of_call, call in calls.items():
        raised[name_of_call] = _raised_by(call)
    tokens = torch.zeros(1, 17, dtype=torch.long)
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:])["total"])
    engine.step()
    raised["mid accumulation"] = _raised_by(lambda: weights.rescale_({name: (0.5, 0.0)}))
    raised["changed"] = str(any(not np.array_equal(w, before[n]) for n, w in masters(engine).items()))
    return raised


def raise_in_the_loop(config: Config) -> None:
    """Fail on one rank on the way; the others must not wait for it for ever."""
    _, weights = build(config)
    for number, (_, full) in enumerate(gathered(weights)):
        full += 1.0
        if number == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise ArithmeticError("a method failed on the last rank")


def _raised_by(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _compare(engine: Engine, expected: dict[str, np.ndarray]) -> tuple[bool, bool]:
    """Return whether the masters are as expected, and whether every working copy is its master, rounded."""
    master, working = masters(engine), working_copies(engine)
    exact = all(np.array_equal(master[name], values) for name, values in expected.items())
    return exact, all(torch.equal(working[n], torch.from_numpy(master[n]).to(working[n].dtype)) for n in master)


def train_with_methods(config: Config, path: str) -> None:
    """Take four steps with the run's methods; the weights before and after, losses and rescales go to `path`."""
    engine, weights = build(config)
    for method in config.methods:
        method.prepare(weights)
    start = masters(engine)
    losses, rescaled = [], []
    for number in range(1, 5):
        losses.append(step(engine, number, 1e-3))
        for method in config.methods:
            statistics = method.after_step(number, weights)
            rescaled += [f"{number} {name}" for name, row in statistics.items() if row["rescaled"]]
    end = masters(engine)
    if dist.get_rank() == 0:
        tables = {f"start/{n}": w for n, w in start.items()} | {f"end/{n}": w for n, w in end.items()}
        save_arrays(path, {"losses": np.array(losses), "rescaled": np.array(rescaled), **tables})


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: the measurements of each case go to the file `out`, the weights of trainings to `out`.<case>.npz."""
    initialize()
    allow_fp16_on_cpu()
    seen: dict[str, Any] = {}
    for name, case in cases.items():
        forget_garbage()
        config = run_config(case)
        if case.get("misuse"):
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, misuse(config.model_copy(update={"data": accumulating(config.data)})))
            seen[name] = everyone
        elif case.get("raise"):
            raise_in_the_loop(config)
        elif case.get("train"):
            train_with_methods(config, f"{out}.{name}.npz")
        else:
            seen[name] = examine(config, case)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(seen), encoding="utf-8")
    leave()
