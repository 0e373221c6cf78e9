"""Counts of the host's waits for the device in a step, on real ranks whose accelerator counts as asynchronous.

docs/performance.md has these figures.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import pytest

from tests.support.runs import start_ranks
from tests.support.workers.waits_worker import count

MICRO_BATCHES = 4

# By ZeRO stage: the waits of a step of MICRO_BATCHES. Those that are as many as the micro-batches come once in each.
WAITS = {
    1: {
        "_local_scalar_dense: utils.py:is_invalid_grad_norm": 1,
        "_local_scalar_dense: utils.py:clip_tensors_by_global_norm": 1,
        "tolist: step_gate.py:_read": 1,
    },
    2: {
        "device: stage_1_and_2.py:independent_gradient_partition_epilogue": MICRO_BATCHES,
        "_local_scalar_dense: utils.py:is_invalid_grad_norm": 2,  # one for each parameter group
        "tolist: step_gate.py:_read": 1,
    },
    3: {
        "stream: stage3.py:independent_gradient_partition_epilogue": MICRO_BATCHES,
        "_local_scalar_dense: utils.py:is_invalid_grad_norm": 1,
        "tolist: step_gate.py:_read": 1,
        "device: partition_parameters.py:_allgather_params_coalesced": 1,  # of weights that stay whole on each rank
    },
}

# Of the optimizer and the recorder on a CPU: AdamW is not fused there and keeps its count of steps on the host, and
# operations on lists of tensors read a factor that is a tensor. On a GPU neither waits.
_ONLY_ON_A_CPU = {
    "_local_scalar_dense: step_gate.py:_step",
    "_local_scalar_dense: adamw.py:directions",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    def case(stage: int, **more: object) -> dict:
        ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage, "overlap_comm": True}, **more}
        return {"deepspeed": ds_config, "micro_batches": MICRO_BATCHES}

    cases = {str(stage): case(stage) for stage in WAITS}
    cases["timed"] = case(1, timers={"throughput": {"enabled": True}})
    out = tmp_path_factory.mktemp("ranks")
    with start_ranks([], out / "logs", 2, prepare=partial(count, cases, out)) as job:
        ended = job.wait()
    assert ended.code == 0, ended.stderr[-5000:]
    waits = json.loads((out / "found.json").read_text())
    return {
        name: {place: n for place, n in each.items() if place not in _ONLY_ON_A_CPU} for name, each in waits.items()
    }


@pytest.mark.parametrize("stage", WAITS)
def test_the_host_waits_as_often_as_stated(found, stage: int) -> None:
    assert found[str(stage)] == WAITS[stage]


def test_the_timer_that_is_off_would_wait_twice_in_each_micro_batch(found) -> None:
    more = Counter(found["timed"])
    more.subtract(found["1"])
    assert +more == {"device: timer.py:start": MICRO_BATCHES, "device: timer.py:stop": MICRO_BATCHES}
