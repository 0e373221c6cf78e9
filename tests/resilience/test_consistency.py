"""Ranks that disagree are found and named, at start and later. Ranks that agree are never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.corpus import Corpus, documents_of, make_corpus
from tests.support.runs import (
    REPOSITORY,
    TRAIN,
    Ended,
    arguments,
    assert_refused,
    free_port,
    losses,
    open_process,
    run_ranks,
    run_together,
    start_ranks,
    status,
    wait_for,
)
from tests.support.sharded_cases import cases
from tests.support.workers import consistency_worker

HOST = socket.gethostname()

# (ranks, of a tensor-parallel cut): the layouts of each that every change is tested with, None for all there are.
WORLDS: dict[tuple[int, int], list[str] | None] = {
    (2, 1): [
        *("zero0_fp32", "zero0_bf16", "zero1_bf16", "zero1_bf16_accumulated", "zero2_fp32", "zero2_round_robin"),
        *("zero3_fp32", "zero3_fp16", "zero3_bf16_nothing_resident", "zero3_all_offloaded", "zero3_copy_within_nodes"),
    ],
    (3, 1): ["zero0_bf16", "zero1_fp32", "zero3_bf16"],
    (2, 2): ["bf16_zero1", "fp32_zero3"],
}
SLOW_WORLDS: dict[tuple[int, int], list[str] | None] = {(2, 1): None, (3, 1): None, (2, 2): None, (4, 2): None}
CHECKED = ("initial", "step 1", "step 2", "step 3", "rescaled", "evaluated")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Return the messages of the ranks of a world, rank by rank: {layout: {check: message}}."""
    finished: dict = {}

    def of(world: tuple[int, int], layouts: list[str] | None) -> list[dict[str, dict[str, str]]]:
        key = world, layouts is None
        if key not in finished:
            out = tmp_path_factory.mktemp("agreement") / "said.json"
            todo = {name: case for name, case in cases(world).items() if layouts is None or name in layouts}
            prepare = partial(consistency_worker.main, todo, out)
            ended = run_ranks([], out.parent, world[0], prepare=prepare)
            assert ended.code == 0, ended.stderr[-5000:]
            finished[key] = json.loads(out.read_text())
        return finished[key]

    return of


every_world = pytest.mark.parametrize(
    ("world", "layouts"),
    [
        *(pytest.param(*item, id="{}_ranks-cut_in_{}".format(*item[0])) for item in WORLDS.items()),
        *(
            pytest.param(*item, id="{}_ranks-cut_in_{}-all".format(*item[0]), marks=pytest.mark.slow)
            for item in SLOW_WORLDS.items()
        ),
    ],
)


@every_world
def test_ranks_that_hold_the_same_agree_in_every_layout(said: Callable, world: tuple, layouts: list | None) -> None:
    for of_rank in said(world, layouts):
        for layout, words in of_rank.items():
            mended = [check for check in words if check.endswith("mended")]
            assert len(mended) >= 2
            assert {check: words[check] for check in (*CHECKED, *mended) if words[check]} == {}, layout


@every_world
def test_one_flipped_bit_is_found_with_its_weight_and_its_rank(
    said: Callable, world: tuple, layouts: list | None
) -> None:
    ranks, tensor = world
    last = f"rank {ranks - 1} ({HOST})"
    everyones = said(world, layouts)
    for layout in everyones[0]:
        one_copy = layout in ("zero0_fp32", "zero0_tied", "fp32_zero0")  # master and working copy are the same memory
        if one_copy and tensor == ranks:
            continue  # nothing to compare with
        for check in everyones[0][layout]:
            if ": " not in check or check.endswith("mended"):
                continue
            (words,) = {of_rank[layout][check] for of_rank in everyones}
            what, weight = check.split(": ")
            assert set(re.findall(r"[\w.]+\.(?:weight|bias)", words)) == {weight}, f"{layout}, {what}"
            apart = f"working copy and master differ on {last}: {weight} in 1 element" in words
            unequal = f"{last} than on the {ranks - 1} others: {weight}" in words
            if ranks // tensor == 2:
                unequal = f" than on {last}, and no majority shows which is right: {weight}" in words
            assert apart or unequal
            assert apart or one_copy or what not in ("working copy", "master")
            assert unequal or what != "range of another rank"


@every_world
def test_ranks_at_other_places_are_named_with_them(said: Callable, world: tuple, layouts: list | None) -> None:
    ranks, _ = world
    for of_rank in said(world, layouts):
        for words in of_rank.values():
            rate = "learning rate: 0.001 on rank 0 ({}), 0.001000000000000001 on "
            last = f"rank 1 ({HOST})" if ranks == 2 else f"the {ranks - 1} others"
            assert rate.format(HOST) + last in words["lr"]
            places = [f"{12 * rank} on rank {rank} ({HOST})" for rank in range(ranks)]
            assert "samples: " + ", ".join(places) in words["samples"]


def on_rank_1(action: Callable[[], None]) -> None:
    if os.environ["RANK"] == "1":
        action()


def other_setting() -> None:
    sys.argv += ["--set", "optim.schedule.warmup_steps=1", "--set", "methods.1.target_std=0.02"]


def other_arithmetic() -> None:
    torch.set_float32_matmul_precision("high")


def other_libraries() -> None:
    from importlib import metadata

    real = metadata.version
    metadata.version = lambda name: "0.0.1" if name == "transformers" else real(name)


@pytest.fixture(scope="module")
def nodes(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the working directories of two nodes, with different data of the same size and tokenizer at the same path."""
    first, second = (tmp_path_factory.mktemp("node") for _ in range(2))
    shutil.copytree(corpus.train, first / "shards")
    other = make_corpus(second / "other", documents_of(400)[::-1])
    shutil.copytree(other.train, second / "shards")
    manifest = second / "shards/manifest.json"
    same = {"tokenizer_fingerprint": json.loads((corpus.train / "manifest.json").read_text())["tokenizer_fingerprint"]}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | same))
    return first, second


def stand_on(nodes: tuple[Path, Path]) -> None:
    os.chdir(nodes[int(os.environ["RANK"])])


@pytest.fixture(scope="module")
def refused(run_file: Path, nodes: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Return runs whose second rank differs, each in another way."""
    out = tmp_path_factory.mktemp("refused")
    ways = {
        "setting": partial(on_rank_1, other_setting),
        "arithmetic": partial(on_rank_1, other_arithmetic),
        "libraries": partial(on_rank_1, other_libraries),
        "data": partial(stand_on, nodes),
    }
    with ExitStack() as stack:
        jobs = {}
        for name, prepare in ways.items():
            settings = {"out": str(out), "name": name, **({"data.train": "shards"} if name == "data" else {})}
            job = start_ranks(arguments(run_file, settings), out / "logs" / name, prepare=prepare)
            jobs[name] = stack.enter_context(job)
        ended = {name: job.wait() for name, job in jobs.items()}
    assert not [name for name in ways if (out / name).exists()]
    return ended


EXPECTED = {
    "setting": (
        "configuration optim.schedule.warmup_steps: 2 on rank 0 ({host}), 1 on rank 1 ({host})",
        "configuration methods.tvr.target_std: 0.01 on rank 0 ({host}), 0.02 on rank 1 ({host})",
    ),
    "arithmetic": ("arithmetic float32_matmul_precision: highest on rank 0 ({host}), high on rank 1 ({host})",),
    "libraries": ("version of transformers: ", "0.0.1 on rank 1 ({host})"),
    "data": ("training data shards: ",),
}


@pytest.mark.parametrize("way", EXPECTED)
def test_ranks_that_would_not_run_the_same_are_refused_by_name(refused: dict[str, Ended], way: str) -> None:
    assert_refused(refused[way], "the ranks do not run the same", *(part.format(host=HOST) for part in EXPECTED[way]))


def test_a_node_with_other_code_is_refused_and_the_file_is_named(run_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "pretrain", other / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "pretrain/optim/param_groups.py", "a", encoding="utf-8") as file:
        file.write("\n# a later version\n")
    words = arguments(run_file, {"out": str(tmp_path), "name": "run"})
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_port())
    ended = wait_for(
        [
            open_process(
                [sys.executable, str(root / TRAIN), *words], {**place, "RANK": str(rank), "PYTHONPATH": str(root)}
            )
            for rank, root in enumerate((REPOSITORY, other))
        ]
    )
    assert_refused(ended, "the ranks do not run the same", "file pretrain/optim/param_groups.py: ")
    assert "and" not in ended.stderr.split("param_groups.py: ")[1].split(". Give")[0]


RUN = {"steps": 6, "data.val": None, "checkpoint.interval_steps": 2, "resilience.agreement_interval_steps": 3}
DATA_PARALLEL = {"zero_optimization": {"stage": 0}}


def flip_after(step: int) -> None:
    """Flip a bit in the memory of one rank when this step is done. For `prepare`."""
    from pretrain.monitor.weight_monitor import WeightMonitor

    real = WeightMonitor.after_step

    def after_step(self: WeightMonitor, number: int) -> dict:
        if number == step:
            consistency_worker.flip(self.weights.engine.module.lm_head.weight.data.view(-1)[100:101], 3)
        return real(self, number)

    WeightMonitor.after_step = after_step


def test_a_flipped_bit_ends_the_run_at_the_next_check_and_the_same_command_undoes_it(
    run_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = arguments(run_file, {"out": str(tmp_path), "name": "run", **RUN, "deepspeed": DATA_PARALLEL})
    struck = run_ranks(words, tmp_path / "struck", prepare=partial(on_rank_1, partial(flip_after, 2)))
    assert struck.code == 3
    left = status(folder)
    assert (left["status"], left["exit_code"], left["step"]) == ("failed", 3, 3)
    assert "the ranks disagree after step 3: different on rank 0" in left["reason"]
    assert "lm_head.weight" in left["reason"]
    whole = arguments(run_file, {"out": str(tmp_path), "name": "whole", **RUN, "deepspeed": DATA_PARALLEL})
    ended = run_together({"again": (words, 2), "whole": (whole, 2)}, tmp_path / "logs")
    assert {name: one.code for name, one in ended.items()} == {"again": 0, "whole": 0}
    assert f"resumed from {folder}/checkpoints/step_00000002" in ended["again"].stdout
    assert losses(folder) == losses(tmp_path / "whole")
