"""A running engine that loads an older checkpoint continues bit for bit as it did the first time."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.support.runs import start_ranks
from tests.support.selection import asked_for, slow_but
from tests.support.workers.rollback_worker import BEFORE, examine_all


def layout(stage: int, asynchronous: bool = False, **more: object) -> dict:
    deepspeed = {"zero_optimization": {"stage": stage}, **more}
    return {"deepspeed": deepspeed, "micro_batch_size": 2, "asynchronous": asynchronous}


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 4}}
CASES = {
    **{f"zero{stage}_fp32": layout(stage, asynchronous=stage == 3) for stage in range(4)},
    "zero0_bf16": layout(0, **BF16, data_types={"grad_accum_dtype": "bf16"}),
    **{f"zero{stage}_bf16": layout(stage, asynchronous=stage == 1, **BF16) for stage in (1, 2, 3)},
    "zero2_fp16": layout(2, asynchronous=True, **FP16),
}

FAST = ("zero3_fp32", "zero1_bf16", "zero0_bf16", "zero2_fp16")


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return the results of each rank, by case."""
    out = tmp_path_factory.mktemp("ranks")
    with start_ranks([], out / "logs", prepare=partial(examine_all, asked_for(request, CASES), out)) as job:
        ended = job.wait()
        assert ended.code == 0, ended.stderr[-5000:]
    return [json.loads((out / f"found_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", slow_but(FAST, CASES))
def test_a_run_that_is_rolled_back_continues_as_it_did_and_as_a_resumed_one_does(seen: list[dict], case: str) -> None:
    for rank in seen:
        found = rank[case]
        assert found["loaded"] == BEFORE
        assert found["again"] == found["first"], "losses and random numbers"
        assert found["in_new_engine"] == found["first"]
        assert found["weights"] == [True, True]
        assert found["first"][:5] != found["before"][:5]
        assert found["earlier"] == "None"
    assert seen[0][case]["first"] != seen[1][case]["first"], "each rank has its own part of the batch"
