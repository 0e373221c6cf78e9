"""The memory that is predicted for a rank against that of real ranks, and of autograd on real tensors."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.support.runs import run_ranks
from tests.support.workers.memory_worker import measure_all


def zero(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, **more}


BF16 = {"bf16": {"enabled": True}}
CASES = {
    "zero0_fp32": {"deepspeed": zero(0)},
    "zero1_bf16": {"deepspeed": zero(1, **BF16)},
    "zero2_bf16": {"deepspeed": zero(2, **BF16)},
    "zero3_bf16": {"deepspeed": zero(3, **BF16)},
    "zero2_fp32": {"deepspeed": zero(2)},
    "zero3_fp32": {"deepspeed": zero(3)},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("memory")
    ended = run_ranks([], out / "logs", 2, prepare=partial(measure_all, CASES, out))
    assert ended.code == 0, ended.stderr[-5000:]
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("part", ["states", "activations"])
@pytest.mark.parametrize("case", CASES)
def test_memory_is_predicted_within_a_tenth(measured: dict, case: str, part: str) -> None:
    assert measured[case]["predicted"][part] == pytest.approx(measured[case]["found"][part], rel=0.1)
