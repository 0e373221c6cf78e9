"""Ranks that do not find each other name the missing ranks, react to signals, and name the fault of their place."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pretrain.distributed.ranks import map_environment
from pretrain.distributed.rendezvous import Place, _ranks, meet
from pretrain.errors import MachineFault
from tests.support.runs import Ended, Job, arguments, assert_refused, free_port, start_ranks

SOON_S = 60  # on a loaded machine; a rank that waits has 21 minutes


def said(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def wait_for_words(job: Job, number: int, words: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not re.search(words, said(job.logs[number][1])):
        assert job.running, job.wait()
        assert time.monotonic() < deadline, f"nothing of {words!r} in {said(job.logs[number][1])!r}"
        time.sleep(0.05)


def ends_within(job: Job, seconds: float) -> Ended:
    began = time.monotonic()
    ended = job.wait()
    assert time.monotonic() - began < seconds
    return ended


@pytest.fixture
def words(run_file: Path, tmp_path: Path) -> list[str]:
    return arguments(run_file, {"out": str(tmp_path), "name": "run"})


@pytest.fixture
def listener() -> Iterator[int]:
    """Return the port of a listener that accepts connections and sends nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", free_port()))
        silent.listen()
        yield silent.getsockname()[1]


@pytest.mark.slow
def test_a_rank_that_waits_says_for_whom_and_where_and_any_signal_ends_it(words: list[str], tmp_path: Path) -> None:
    """One rank of each pair is started, and each gets another signal."""
    numbers = {signal.SIGTERM: 0, signal.SIGINT: 1, signal.SIGUSR1: 0, signal.SIGHUP: 1}
    awaited = {
        0: r"rank 0 of 2 waits at 127\.0\.0\.1:\d+ for rank 1 ",
        1: r"rank 1 of 2 waits at 127\.0\.0\.1:\d+ for rank 0: nothing listens there yet ",
    }
    with ExitStack() as stack:
        jobs = {
            number: stack.enter_context(start_ranks(words, tmp_path / number.name, only=[rank]))
            for number, rank in numbers.items()
        }
        for number, job in jobs.items():
            wait_for_words(job, 0, awaited[numbers[number]])
            job.signal(number)
            ended = ends_within(job, 10)
            assert ended.code == 128 + number
            assert "WORLD_SIZE=2 comes from the environment: unset it to run alone" in ended.stderr
            assert f"stopped by {number.name} before training began" in ended.stderr
            assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_stopped_takes_along_those_that_have_come(words: list[str], tmp_path: Path) -> None:
    with start_ranks(words, tmp_path / "logs", ranks=4, only=[0, 1]) as job:
        wait_for_words(job, 0, r"rank 0 of 4 waits at 127\.0\.0\.1:\d+ for ranks 2-3 ")
        job.signal(signal.SIGTERM, [1])
        ended = ends_within(job, 10)
    assert ended.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at rank 1 before training began" in ended.stderr


def test_ranks_of_a_launcher_that_cannot_reach_rank_0_have_one_that_reports_on_each_node(
    words: list[str], tmp_path: Path
) -> None:
    with start_ranks(words, tmp_path / "logs", ranks=4, only=[1, 2], variables={"PMI_RANK": "1"}) as job:
        time.sleep(1)
        second = {"PMI_RANK": "3", "LOCAL_RANK": "0"}
        with start_ranks(words, tmp_path / "node", ranks=4, only=[3], variables=second) as other:
            wait_for_words(other, 0, "rank 3 of 4 waits at .* for rank 0: nothing listens there yet")
            other.signal(signal.SIGTERM)
            assert "comes from the environment" not in ends_within(other, 10).stderr
        job.signal(signal.SIGTERM)
        assert "waits at" not in ends_within(job, 10).stderr


def test_a_hangup_is_ignored_under_nohup(words: list[str], tmp_path: Path) -> None:
    with start_ranks(words, tmp_path / "logs", only=[0], prepare=as_under_nohup) as job:
        wait_for_words(job, 0, "waits at")
        job.signal(signal.SIGHUP)
        time.sleep(1)
        assert job.running
        job.signal(signal.SIGTERM)
        assert ends_within(job, 10).code == 128 + signal.SIGTERM


def as_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_is_heard_while_the_main_thread_is_in_a_library_that_does_not_return(
    words: list[str], listener: int, tmp_path: Path
) -> None:
    """A store's client waits, in torch's own code, for ever at a port whose listener sends nothing."""
    variables = {"MASTER_PORT": str(listener)}
    with start_ranks(words, tmp_path / "logs", only=[1], variables=variables, prepare=wait_in_the_library) as job:
        wait_for_words(job, 0, "now in the library")
        job.signal(signal.SIGTERM)
        ended = ends_within(job, 20)
    assert ended.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before training began" in ended.stderr


def wait_in_the_library() -> None:
    import sys

    from pretrain.distributed import ranks
    from pretrain.distributed.rendezvous import _store

    def in_the_library(place: Place, *_: object) -> None:
        print("now in the library", file=sys.stderr, flush=True)
        _store(place, place.address, is_master=False)

    ranks.meet = in_the_library


def test_what_answers_but_is_no_store_is_said_and_left(words: list[str], listener: int, tmp_path: Path) -> None:
    with start_ranks(words, tmp_path / "logs", only=[1], variables={"MASTER_PORT": str(listener)}) as job:
        wait_for_words(job, 0, "for rank 0: what listens there does not answer as a store does")
        job.signal(signal.SIGTERM)
        assert ends_within(job, 10).code == 128 + signal.SIGTERM


def test_a_port_that_is_taken_is_named_with_who_has_it(words: list[str], listener: int, tmp_path: Path) -> None:
    port = {"MASTER_PORT": str(listener)}
    job_step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    with ExitStack() as stack:
        alone = stack.enter_context(start_ranks(words, tmp_path / "alone", only=[0], variables=port))
        in_slurm = stack.enter_context(start_ranks(words, tmp_path / "slurm", only=[0], variables=port | job_step))
        assert_refused(alone.wait(), f"port {listener}", "is in use by", "MASTER_PORT")
        ended = in_slurm.wait()
    assert ended.code == 3
    assert f"port {listener}" in ended.stderr
    assert "takes another when it starts again" in ended.stderr


def test_ranks_that_contradict_each_other_are_refused_together(words: list[str], tmp_path: Path) -> None:
    port = {"MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        of_two = stack.enter_context(start_ranks(words, tmp_path / "two", ranks=3, only=[0], variables=port))
        of_three = stack.enter_context(start_ranks(words, tmp_path / "three", ranks=4, only=[1], variables=port))
        ended = [of_two.wait(), of_three.wait()]
    assert [each.code for each in ended] == [2, 2]
    assert "WORLD_SIZE=4" in ended[0].stderr
    assert "WORLD_SIZE=3" in ended[0].stderr

    port = {"MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        twins = [
            stack.enter_context(start_ranks(words, tmp_path / name, ranks=3, only=only, variables=port))
            for name, only in (("first", [0, 1]), ("second", [1]))
        ]
        ended = [twin.wait() for twin in twins]
    assert [each.code for each in ended] == [2, 2]
    assert "two processes were started as RANK=1" in ended[0].stderr


WRONG = {
    "RANK=2": ({"RANK": "2"}, ("RANK=2", "WORLD_SIZE=2", "0 to 1")),
    "RANK=x": ({"RANK": "x"}, ("RANK=x",)),
    "RANK=-1": ({"RANK": "-1"}, ("RANK=-1",)),
    "WORLD_SIZE=two": ({"WORLD_SIZE": "two"}, ("WORLD_SIZE=two",)),
    "WORLD_SIZE=0": ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0",)),
    "no WORLD_SIZE": ({"WORLD_SIZE": ""}, ("WORLD_SIZE is not",)),
    "LOCAL_RANK=1.5": ({"LOCAL_RANK": "1.5"}, ("LOCAL_RANK=1.5",)),
    "MASTER_PORT=http": ({"MASTER_PORT": "http"}, ("MASTER_PORT=http",)),
    "MASTER_PORT=70000": ({"MASTER_PORT": "70000"}, ("MASTER_PORT=70000",)),
    "no such machine": ({"MASTER_ADDR": "no-such-machine.invalid"}, ("MASTER_ADDR=no-such-machine.invalid",)),
    "another machine": ({"MASTER_ADDR": "192.0.2.7"}, ("MASTER_ADDR=192.0.2.7", "no address of")),
}


@pytest.fixture(scope="module")
def refused(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    out = tmp_path_factory.mktemp("wrong")
    command = arguments(run_file, {"out": str(out), "name": "run"})
    with ExitStack() as stack:
        jobs = {
            name: stack.enter_context(start_ranks(command, out / name, only=[0], variables=wrong))
            for name, (wrong, _) in WRONG.items()
        }
        return {name: job.wait() for name, job in jobs.items()}


@pytest.mark.parametrize("name", WRONG)
def test_a_place_that_cannot_be_meant_is_refused_in_a_sentence(refused: dict[str, Ended], name: str) -> None:
    assert_refused(refused[name], *WRONG[name][1])


def test_a_dry_run_checks_the_place_and_waits_for_no_rank(words: list[str], tmp_path: Path) -> None:
    with ExitStack() as stack:
        wrong = stack.enter_context(
            start_ranks([*words, "--dry-run"], tmp_path / "wrong", only=[0], variables={"WORLD_SIZE": "two"})
        )
        right = stack.enter_context(start_ranks([*words, "--dry-run"], tmp_path / "right", only=[0]))
        assert_refused(wrong.wait(), "WORLD_SIZE=two")
        assert right.wait().code == 0


def test_ranks_that_never_come_are_a_fault_of_the_machine() -> None:
    port = free_port()
    for rank, awaited in ((0, "rank 1"), (1, "rank 0: nothing listens there yet")):
        place = Place(rank, 2, "127.0.0.1", port + rank, hosted=False)
        with pytest.raises(
            MachineFault, match=rf"rank {rank} of 2 waited 1 s at 127.0.0.1:{port + rank} for {awaited}"
        ):
            meet(place, limit_s=1.0)


def test_long_lists_of_ranks_are_short() -> None:
    assert _ranks([5]) == "rank 5"
    assert _ranks([1, 2, 3, 7, 9, 10]) == "ranks 1-3, 7, 9-10"
    assert len(_ranks(range(0, 100_000, 2))) < 200


@pytest.mark.parametrize(("restart", "port"), [("0", "21234"), ("1", "22243")])
def test_a_job_of_slurm_takes_another_port_when_it_starts_again(
    monkeypatch: pytest.MonkeyPatch, restart: str, port: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"JOB_ID": "1234", "STEP_ID": "0", "PROCID": "0", "NTASKS": "2", "LOCALID": "0", "RESTART_COUNT": restart}
    environment = (
        dict(os.environ) | {f"SLURM_{key}": value for key, value in slurm.items()} | {"MASTER_ADDR": "127.0.0.1"}
    )
    monkeypatch.setattr("pretrain.distributed.ranks.os.environ", environment)
    map_environment()
    assert environment["MASTER_PORT"] == port
