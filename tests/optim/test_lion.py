"""Lion on real ranks against its formula, dense on one process, with transformers' own class and autograd."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config.optim_section import OptimSection
from pretrain.optimizers import OPTIMIZERS
from tests.support.runs import run_ranks
from tests.support.tiny_engines import LENGTH, VOCABULARY, tokens
from tests.support.workers.muon_worker import SEQUENCES, SIZES, STEPS, examine_all, learning_rate

LION = {"name": "lion", "lr": 2e-3, "betas": [0.9, 0.8], "weight_decay": 0.3, "grad_clip": None}
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def zero(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


CASES = {
    "zero0": {"deepspeed": zero(0), "accumulation": 2},
    "zero1": {"deepspeed": zero(1)},
    "zero2": {"deepspeed": zero(2), "accumulation": 2},
    "zero2_offloaded": {"deepspeed": zero(2, **OFFLOAD)},
    "zero3": {"deepspeed": zero(3, sub_group_size=2000), "accumulation": 2},
    "zero3_offloaded": {"deepspeed": zero(3, **OFFLOAD, stage3_param_persistence_threshold=0)},
}
HALF = {"bf16_zero1": {"deepspeed": {**zero(1), **BF16}}, "bf16_zero3": {"deepspeed": {**zero(3), **BF16}}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Return the weights before and after each case, and the records of each case."""
    out, todo = (
        tmp_path_factory.mktemp("ranks"),
        {name: {**case, "optim": LION} for name, case in {**CASES, **HALF}.items()},
    )
    done = run_ranks([], out / "logs", 2, prepare=partial(examine_all, todo, out))
    assert done.code == 0, done.stdout[-3000:] + done.stderr[-5000:]
    tables = {name: dict(np.load(out / f"{name}.npz")) for name in todo}
    return tables, json.loads((out / "checks.json").read_text(encoding="utf-8"))


def part(table: dict[str, np.ndarray], when: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{when}/"): w for key, w in table.items() if key.startswith(f"{when}/")}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_formula_on_one_process(seen: tuple[dict, dict], case: str) -> None:
    """Where a mixed gradient is near zero rounding decides its sign, which is a whole step. Few elements are."""
    table = seen[0][case]
    start = part(table, "start")
    expected, found = dense_training(start), part(table, "end")
    apart = sum(int((np.abs(found[name] - w) > 1e-6).sum()) for name, w in expected.items())
    assert apart <= 1e-3 * sum(w.size for w in expected.values())
    moved = [np.abs(w - start[name]).max() for name, w in expected.items()]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("case", [*CASES, *HALF])
def test_a_resumed_run_goes_on_bit_for_bit_and_edits_reach_the_masters(seen: tuple[dict, dict], case: str) -> None:
    facts = seen[1][case]
    assert facts["resume_exact"]
    assert facts["moments_right"]
    assert facts["rescaled_survives"]


@pytest.mark.parametrize("case", HALF)
def test_in_bf16_every_matrix_goes_about_as_in_fp32(seen: tuple[dict, dict], case: str) -> None:
    start, end = part(seen[0][case], "start"), part(seen[0][case], "end")
    matrices = {name: w for name, w in dense_training(start).items() if w.ndim == 2}  # a key's bias has only noise
    for name, w in matrices.items():
        way = w - start[name]
        cosine = np.vdot(way, end[name] - start[name]) / np.linalg.norm(way) / np.linalg.norm(end[name] - start[name])
        assert cosine > 0.8, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 1e-6}, "it has no effect with 'name: lion'"),
        ({"muon": {"momentum": 0.9}}, "the keys of 'muon' have no effect"),
    ],
)
def test_keys_without_effect_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimSection.model_validate({**LION, "betas": (0.9, 0.8), **changes})


def test_a_step_that_cannot_be_read_back_is_not_known() -> None:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    read = OPTIMIZERS["lion"].directions
    assert read(weight, {"exp_avg": torch.ones(3)}, {"betas": (0.9, 0.0)}, lambda tensor: [tensor]) is None


def dense_training(start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Train stock transformers in fp32 on whole batches, with Lion by its formula."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SIZES))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in start.items()})
    moments = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    first, second = LION["betas"]
    for number in range(1, STEPS + 1):
        whole = tokens(number, SEQUENCES)
        model.zero_grad()
        logits = model(whole[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten()).backward()
        lr = learning_rate(number, LION["lr"], 0)
        for name, parameter in model.named_parameters():
            gradient, m = parameter.grad, moments[name]
            decay = LION["weight_decay"] if parameter.ndim == 2 else 0.0
            update = (first * m + (1 - first) * gradient).sign() + decay * parameter.data
            parameter.data -= lr * update
            moments[name] = second * m + (1 - second) * gradient
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
