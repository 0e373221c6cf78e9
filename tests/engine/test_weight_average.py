"""The average of sharded weights against float64 on whole weights, and what forward computes with it, for every engine."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.runs import run_ranks
from tests.support.tiny_engines import LENGTH, VOCABULARY, tokens
from tests.support.workers.average_worker import DECAY, SEQUENCES, SIZES, STEPS, examine_all

BF16 = {"bf16": {"enabled": True}}


def zero(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
MUON = {"name": "muon", "grad_clip": None, "muon": {"lr": 1e-2}}
CASES = {
    "zero0": {"deepspeed": zero(0)},
    "zero0_bf16": {"deepspeed": {**zero(0), **BF16, "data_types": {"grad_accum_dtype": "bf16"}}, "unread": True},
    "zero1_bf16": {"deepspeed": {**zero(1), **BF16}},
    "zero2": {"deepspeed": zero(2)},
    "zero2_offloaded": {"deepspeed": zero(2, **OFFLOAD)},
    "zero3": {"deepspeed": zero(3)},
    "zero3_bf16": {"deepspeed": {**zero(3, stage3_param_persistence_threshold=0, sub_group_size=3000), **BF16}},
    "zero3_offloaded": {"deepspeed": zero(3, **OFFLOAD)},
    "zero1_muon": {"deepspeed": zero(1), "optim": MUON},
    "zero3_muon": {"deepspeed": zero(3), "optim": MUON},
    "zero3_bf16_wesar": {"deepspeed": {**zero(3), **BF16}, "methods": [{"name": "wesar"}]},
    "zero2_sigma_reparam": {"deepspeed": zero(2), "methods": [{"name": "sigma_reparam"}]},
    "zero1_tensor": {"deepspeed": zero(1), "tensor": 2, "unread": True},  # the last: the process keeps the layout
}
READ = [name for name, case in CASES.items() if "unread" not in case]  # DeepSpeed's API has no masters of the others
PLAIN = [name for name in READ if "methods" not in CASES[name]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Return the weights and the checks of each case."""
    out = tmp_path_factory.mktemp("average")
    done = run_ranks([], out / "logs", 2, prepare=partial(examine_all, CASES, out))
    assert done.code == 0, done.stderr[-5000:]
    tables = {name: dict(np.load(out / f"{name}.npz")) for name in CASES}
    return tables, json.loads((out / "checks.json").read_text(encoding="utf-8"))


def part(table: dict[str, np.ndarray], when: object) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{when}/"): w for key, w in table.items() if key.startswith(f"{when}/")}


@pytest.mark.parametrize("case", READ)
def test_the_average_is_that_of_whole_weights(seen: tuple[dict, dict], case: str) -> None:
    table = seen[0][case]
    expected = {name: w.astype(np.float64) for name, w in part(table, 1).items()}
    for step in range(2, STEPS + 1):
        expected = {name: DECAY * expected[name] + (1 - DECAY) * w for name, w in part(table, step).items()}
    found = part(table, "average")
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_allclose(found[name], w, rtol=3e-6, atol=1e-8)
    last = part(table, STEPS)
    assert max(np.abs(w - last[name]).max() for name, w in expected.items()) > 1e-3  # and not the last weights


@pytest.mark.parametrize("case", PLAIN)
def test_forward_computes_with_the_average(seen: tuple[dict, dict], case: str) -> None:
    table, checks = seen[0][case], seen[1][case]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SIZES))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in part(table, "average").items()})
    batch = tokens(99, SEQUENCES)
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    assert checks["inside"] == pytest.approx(expected, rel=2e-3 if "bf16" in case else 1e-6)
    assert abs(checks["inside"] - expected) < abs(checks["inside"] - checks["last"]) / 5


@pytest.mark.parametrize("case", CASES)
def test_weights_come_back_to_the_last_bit_and_training_is_not_touched(seen: tuple[dict, dict], case: str) -> None:
    checks = seen[1][case]
    assert checks["changed"]
    assert checks["inside"] != checks["last"]
    assert checks["restored"]
    assert checks["same_loss"]
    assert checks["same_training"]
