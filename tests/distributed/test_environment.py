"""The rank of a process from the variables of each launcher."""

from __future__ import annotations

import pytest

from pretrain.distributed import ranks
from pretrain.distributed.ranks import map_environment, rank_from_environment
from pretrain.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return an environment without launchers' variables, which `map_environment` reads and writes."""
    fake: dict[str, str] = {"PATH": "/nowhere"}
    monkeypatch.setattr(ranks.os, "environ", fake)
    return fake


def mapped(environment: dict[str, str], **variables: str) -> list[str]:
    environment |= variables
    map_environment()
    return [environment[name] for name in NAMES]


def test_plain_python_is_one_rank_on_a_free_port(environment: dict) -> None:
    *place, port = mapped(environment)
    assert place == ["0", "1", "0", "1", "127.0.0.1"]
    assert 1024 < int(port) < 65536
    assert rank_from_environment() == 0


def test_what_torchrun_or_deepspeed_set_is_kept(environment: dict) -> None:
    given = dict(zip(NAMES, ("3", "4", "1", "2", "node7", "29500"), strict=True))
    assert mapped(environment, **given) == list(given.values())
    assert rank_from_environment() == 3


def test_deepspeed_does_not_say_how_many_ranks_are_here_and_all_are_assumed(environment: dict) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert mapped(environment, **given)[3] == "2"


def test_srun_tasks_become_ranks(environment: dict) -> None:
    assert mapped(environment, **SLURM, MASTER_ADDR="10.0.0.1") == ["5", "8", "1", "4", "10.0.0.1", "24567"]
    assert rank_from_environment() == 5


def test_the_address_of_the_first_node_comes_from_slurm_where_none_is_given(
    environment: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_slurm_head_address", lambda slurm: "10.1.2.3")
    assert mapped(environment, **SLURM)[4] == "10.1.2.3"


def test_without_scontrol_the_message_says_what_to_export(environment: dict) -> None:
    with pytest.raises(UserError, match="Export MASTER_ADDR"):
        mapped(environment, **SLURM)


def test_the_shell_of_a_batch_job_is_no_rank_of_it(environment: dict) -> None:
    batch = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert mapped(environment, **batch)[:2] == ["0", "1"]


@pytest.mark.parametrize(
    ("cores", "usable", "ranks_here", "threads"),
    [(64, 64, 8, 8), (64, 8, 8, 8), (64, 16, 8, 2), (2, 2, 4, 1), (8, 8, 1, 8)],
    ids=["shared", "each rank bound to its own", "a part of the machine, shared", "more ranks than cores", "alone"],
)
def test_each_rank_computes_on_its_own_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, usable: int, ranks_here: int, threads: int
) -> None:
    monkeypatch.setattr(ranks.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: set(range(usable)))
    assert ranks.cores_of_rank(ranks_here) == threads


def test_torchrun_inside_a_slurm_job_step_keeps_its_own_ranks(environment: dict) -> None:
    given = dict(zip(NAMES, ("0", "2", "0", "2", "127.0.0.1", "29500"), strict=True))
    assert mapped(environment, **SLURM, **given) == list(given.values())


@pytest.mark.parametrize(
    ("name", "value"), [("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "10000000000")]
)
def test_numbers_of_ranks_that_cannot_be_are_refused(environment: dict, name: str, value: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", name: value}
    with pytest.raises(UserError, match=f"^{name}={value}"):
        mapped(environment, **given)
