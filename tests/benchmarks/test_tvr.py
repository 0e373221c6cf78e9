"""The TVR measurement counts traffic and memory correctly; its times are not tested."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import tvr
from benchmarks.memory import peak_extra_bytes
from benchmarks.traffic import Traffic
from benchmarks.trap import measure_trap
from benchmarks.tvr import growth_exponent, measure_tvr
from pretrain.errors import UserError
from tests.support.runs import ENVIRONMENT

RANKS = 4


@pytest.fixture
def process_group():
    """A group of four ranks, three of them fake."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def quiet_machine(monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


@pytest.mark.usefixtures("process_group")
def test_traffic_is_what_a_ring_brings_each_rank():
    one = torch.zeros(100)
    everyones = torch.empty(RANKS * 100)
    calls = [
        (3 * 400, lambda: dist.all_gather([torch.empty(100) for _ in range(RANKS)], one)),
        (3 * 400, lambda: dist.all_gather_into_tensor(everyones, one)),
        (2 * 400 * 3 / 4, lambda: dist.all_reduce(one)),
        (2 * 800 * 3 / 4, lambda: dist.all_reduce(one.double())),
        (400 * 3 / 4, lambda: dist.broadcast(one, 0)),
    ]
    for received, call in calls:
        with Traffic() as traffic:
            call()
            dist.barrier()
        assert (traffic.received, traffic.collectives) == (received, 1)


@pytest.mark.usefixtures("process_group")
def test_traffic_refuses_a_collective_that_it_cannot_count():
    with pytest.raises(NotImplementedError, match="alltoall_base_"), Traffic():
        dist.all_to_all_single(torch.empty(4), torch.zeros(4))


def test_peak_memory_is_the_largest_sum_of_living_allocations():
    held = []

    def call():
        first = torch.empty(1000)  # 4,000 bytes
        del first
        held.append(torch.empty(500))  # 2,000 bytes
        held.append(torch.empty(700))  # 2,800 bytes
        torch.empty(10)

    assert peak_extra_bytes(call) == 2000 + 2800 + 40
    assert peak_extra_bytes(lambda: None) == 0


def test_growth_is_the_power_of_the_size():
    assert growth_exponent([1e6, 1e7, 4e7], [3e-3 * n**0.5 for n in (1e6, 1e7, 4e7)]) == pytest.approx(0.5)
    assert growth_exponent([1e6, 1e7], [0, 0]) is None


def test_tokens_that_the_ranks_cannot_share_are_refused():
    with pytest.raises(UserError, match="multiple of 256 tokens times 3 ranks"):
        tvr.bench_tvr([1, 3], rounds=1, tokens=1024, resident_below=0)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_machine")
def test_three_schemes_do_the_same_arithmetic_and_their_costs_are_counted():
    (row,) = measure_tvr([2], rounds=1, tokens=512, resident_below=100_000, sizes=[(64, 1)])
    matrices, elements = 7, 4 * 64 * 64 + 3 * 64 * 168
    assert (row["ranks"], row["matrices"], row["parameters"]) == (2, matrices, 2 * 4096 * 64 + elements + 3 * 64)
    assert 0 < row["distance"] < 1e-6
    # The release all-reduces two fp32 numbers and one for each matrix, all of which a rank receives once among two.
    assert row["released received"] == matrices * 3 * 4
    assert row["released collectives"] == 2 * matrices
    assert 0 < row["sharded received"] < 1000
    assert row["sharded collectives"] < row["released collectives"]
    assert row["gathered received"] > elements * 4
    assert row["released peak"] >= 64 * 168 * 4
    assert all(row[f"{scheme} {case}"] > 0 for scheme in tvr.SCHEMES for case in ("all", "none"))
    table = tvr._costs([row]) + tvr._growth([row])
    assert len(re.findall(r"^\| 2 ", table, re.MULTILINE)) == 3 + 4


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_machine")
def test_only_evenkeel_changes_every_copy_and_keeps_the_change():
    for row in measure_trap():
        kept = abs(row["working"] / 0.01 - 1) < 0.01 and abs(row["next"] / 0.01 - 1) < 0.01
        assert kept == row["way"].startswith("Evenkeel"), row
