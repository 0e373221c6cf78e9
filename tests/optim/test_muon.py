"""DeepSpeed's Muon on real ranks against Muon and AdamW written out from their papers, dense on one process.

The ranks are started once per world size and go through every case (muon_worker.py).
"""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config.schema import Config
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.errors import UserError
from tests.support.runs import run_ranks
from tests.support.tiny_engines import LENGTH, VOCABULARY, tokens
from tests.support.workers.muon_worker import OPTIM, SEQUENCES, SIZES, STEPS, examine_all, learning_rate, run_config

BF16 = {"bf16": {"enabled": True}}
TARGET_STD = 0.015


def zero(stage: int, **more) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SPECTRAL = {"muon": {"lr": 5e-3, "weight_decay": None, "scale": "spectral", "momentum": 0.9}, "weight_decay": 0.2}
TVR = {"name": "tvr", "target_std": TARGET_STD, "ratio_threshold": 1.0, "interval_steps": STEPS}

# Newton-Schulz in bf16 blows up differences of rounding, and so do two steps of a bf16 model. So the learning rate is
# 0 up to the last step there: all ranks and stages see the same gradients and gather the same momentum.
LAST_STEP_ONLY = {"idle": STEPS - 1}
HALF = {
    "bf16_zero1": {"deepspeed": {**zero(1), **BF16}, **LAST_STEP_ONLY},
    "bf16_zero3": {"deepspeed": {**zero(3), **BF16}, **LAST_STEP_ONLY},
}
EXACT = {
    2: {
        "zero0": {"deepspeed": zero(0), "accumulation": 2},
        "zero1_accumulated": {"deepspeed": zero(1), "accumulation": 2},
        "zero2": {"deepspeed": zero(2)},
        "zero3": {"deepspeed": zero(3)},
        "zero3_tvr": {"deepspeed": zero(3), "accumulation": 2, "methods": [TVR]},
    },
    3: {
        "zero1_spectral": {"deepspeed": zero(1), "optim": SPECTRAL},
        "zero2_offloaded": {"deepspeed": zero(2, **OFFLOAD), "accumulation": 2},
        "zero3_accumulated": {"deepspeed": zero(3, sub_group_size=2000), "accumulation": 2},
        "zero3_offloaded": {"deepspeed": zero(3, **OFFLOAD, stage3_param_persistence_threshold=0)},
    },
}


def at(ranks: int, case: str):
    """Return pytest's parameters of a case. Those on three ranks are slow."""
    return pytest.param(ranks, case, marks=[pytest.mark.slow] if ranks == 3 else [])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory):
    """Return a function of the number of ranks: weights before and after each case, and the records of each case."""
    finished: dict[int, tuple] = {}

    def at(ranks: int) -> tuple[dict, dict]:
        if ranks not in finished:
            out, todo = tmp_path_factory.mktemp(f"ranks_{ranks}"), EXACT[ranks] | HALF
            done = run_ranks([], out / "logs", ranks, prepare=partial(examine_all, todo, out))
            assert done.code == 0, done.stdout[-3000:] + done.stderr[-5000:]
            tables = {case: dict(np.load(out / f"{case}.npz")) for case in todo}
            finished[ranks] = tables, json.loads((out / "checks.json").read_text())
        return finished[ranks]

    return at


def weights(table: dict[str, np.ndarray], when: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{when}/"): w for key, w in table.items() if key.startswith(f"{when}/")}


def assert_same_way(found: dict, expected: dict, start: dict, tolerance: float) -> None:
    """Assert that every weight ends within `tolerance` of the expected one, relative to the length of its change."""
    for name, w in expected.items():
        error = np.linalg.norm(found[name] - w) / np.linalg.norm(w - start[name])
        assert error < tolerance, f"{name} is off by {error:.1e} of its way"


# Muon makes singular values near 1 of the smallest by multiplying them by up to 3.4445^5 = 485, rounding included:
# 485 * 2^-24 = 3e-5. Seen: 3e-5. Momentum 0.9 for 0.95 is off by 4e-2, weight decay 0.31 for 0.30 by 2e-3.
ROUNDING = 1e-4


@pytest.mark.parametrize(("ranks", "case"), [at(ranks, case) for ranks, cases in EXACT.items() for case in cases])
def test_training_equals_the_published_formulas_on_one_process(seen, ranks: int, case: str) -> None:
    table = seen(ranks)[0][case]
    start = weights(table, "start")
    assert_same_way(weights(table, "end"), dense_training(start, EXACT[ranks][case]), start, ROUNDING)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_in_bf16_stages_1_and_3_agree_and_every_weight_goes_about_as_in_fp32(seen, ranks: int) -> None:
    """DeepSpeed has two implementations here. Only that of stage 1 gathers momentum by matrix."""
    one, three = (seen(ranks)[0][case] for case in HALF)
    start = weights(one, "start")
    assert_same_way(weights(three, "end"), weights(one, "end"), start, ROUNDING)
    dense = dense_training(start, HALF["bf16_zero1"])
    assert_same_way(weights(one, "end"), dense, start, 0.5)  # a lost gradient is off by 1


every_case = pytest.mark.parametrize(
    ("ranks", "case"), [at(ranks, case) for ranks, cases in EXACT.items() for case in cases | HALF]
)


@every_case
def test_a_resumed_run_goes_on_bit_for_bit(seen, ranks: int, case: str) -> None:
    assert seen(ranks)[1][case]["resume_exact"]


@every_case
def test_sharded_weights_read_and_change_the_masters_of_this_engine(seen, ranks: int, case: str) -> None:
    facts = seen(ranks)[1][case]
    assert facts["moments_right"]
    assert facts["rescaled_survives"]


def test_tvr_acts_on_what_muon_has_stepped(seen) -> None:
    end = weights(seen(2)[0]["zero3_tvr"], "end")
    stds = {name: w.std(ddof=1, dtype=np.float64) for name, w in end.items() if _in_block(name, w)}
    assert len(stds) == 14
    assert stds == pytest.approx(dict.fromkeys(stds, TARGET_STD), rel=1e-6)


REFUSED = {
    "fp16": ({"deepspeed": {**zero(3), "fp16": {"enabled": True}}}, "fp16 .*momentum at the loss scale"),
    "bf16 at stage 2": ({"deepspeed": {**zero(2), **BF16}}, "rounds to bf16 at ZeRO stage 2.*stage 1 or 3"),
    "bf16 at stage 0": (
        {"deepspeed": {**zero(0), **BF16, "data_types": {"grad_accum_dtype": "bf16"}}},
        "rounds to bf16 at ZeRO stage 0",
    ),
    "bf16 accumulation": (
        {"deepspeed": {**zero(3), **BF16, "data_types": {"grad_accum_dtype": "bf16"}}},
        'data_types.grad_accum_dtype "bf16"',
    ),
    "reduce_scatter": ({"deepspeed": zero(1, reduce_scatter=True)}, "reduce_scatter false.*loses gradients"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_deepspeed_gets_wrong_is_refused_with_the_reason(name: str) -> None:
    case, message = REFUSED[name]
    with pytest.raises(UserError, match=f"the run file's 'deepspeed': .*{message}"):
        deepspeed_config(run_config(case, 2), 2)


def test_tensor_parallel_matrices_are_refused() -> None:
    config = run_config({"deepspeed": zero(3)}, 2)
    cut = Config.model_validate({**config.model_dump(mode="json"), "parallel": {"tensor": 2}})
    with pytest.raises(UserError, match=r"parallel\.tensor 2 .*its own slice of a matrix"):
        deepspeed_config(cut, 2)


@pytest.mark.parametrize("given", [{}, {"reduce_scatter": "auto"}, {"reduce_scatter": False}])
def test_reduce_scatter_is_switched_off_for_muon_alone(given: dict) -> None:
    config = run_config({"deepspeed": zero(3, **given)}, 2)
    assert deepspeed_config(config, 2)["zero_optimization"]["reduce_scatter"] is False
    adamw = config.model_copy(update={"optim": config.optim.model_copy(update={"name": "adamw"})})
    zero_block = deepspeed_config(adamw, 2)["zero_optimization"]
    assert zero_block.get("reduce_scatter", "unset") == (False if given == {"reduce_scatter": False} else "unset")


def dense_training(start: dict[str, np.ndarray], case: dict) -> dict[str, np.ndarray]:
    """Train stock transformers in fp32 on whole batches, with the optimizers and TVR by their formulas."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SIZES))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in start.items()})
    optim = {"betas": (0.9, 0.95), "weight_decay": 0.1, **OPTIM, **case.get("optim", {})}
    states: dict[str, dict] = {name: {} for name in start}
    for number in range(1, STEPS + 1):
        whole = tokens(number, SEQUENCES)
        logits = model(whole[:, :-1], use_cache=False).logits
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten()).backward()
        lr = learning_rate(number, optim["lr"], case.get("idle", 0))
        for name, parameter in model.named_parameters():
            update = _muon if _in_block(name, parameter) else _adamw
            update(parameter.data, parameter.grad, states[name], lr, number, optim)
            if "methods" in case and number == STEPS and _in_block(name, parameter):
                mean, std = parameter.data.double().mean(), parameter.data.double().std()
                assert std > TARGET_STD, "TVR never acts: the test would show nothing"
                parameter.data.copy_((parameter.data.double() - mean) * TARGET_STD / std + mean)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def _in_block(name: str, weight) -> bool:
    return name.startswith("model.layers.") and weight.ndim == 2


def _muon(weight: torch.Tensor, gradient: torch.Tensor, state: dict, lr: float, _: int, optim: dict) -> None:
    muon = {"momentum": 0.95, "scale": "adam_rms", **optim["muon"]}
    lr *= muon["lr"] / optim["lr"]
    beta = muon["momentum"]
    average = state["average"] = beta * state.get("average", 0.0) + (1 - beta) * gradient
    direction = _newton_schulz((1 - beta) * gradient + beta * average)
    rows, columns = weight.shape
    scale = 0.2 * max(rows, columns) ** 0.5 if muon["scale"] == "adam_rms" else max(1.0, rows / columns) ** 0.5
    decay = optim["weight_decay"] if muon["weight_decay"] is None else muon["weight_decay"]
    weight.mul_(1 - lr * decay).sub_(lr * scale * direction)


def _newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _adamw(weight: torch.Tensor, gradient: torch.Tensor, state: dict, lr: float, number: int, optim: dict) -> None:
    first, second = optim["betas"]
    state["m"] = first * state.get("m", 0.0) + (1 - first) * gradient
    state["v"] = second * state.get("v", 0.0) + (1 - second) * gradient**2
    decay = optim["weight_decay"] if weight.ndim == 2 else 0.0
    size = (state["v"] / (1 - second**number)).sqrt() + optim["eps"]
    weight.mul_(1 - lr * decay).sub_(lr * state["m"] / (1 - first**number) / size)
