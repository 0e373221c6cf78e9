"""Runs whose batch grows: losses of a dense process, resumed bit for bit, on other ranks, audited, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pretrain.checkpoints.stored import master_weights
from pretrain.config.schema import Config
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.samples import SampleRows
from pretrain.trainer.plan import make_plan
from tests.support.corpus import Corpus
from tests.support.dense import DenseLlama
from tests.support.method_suite import LLAMA, settings_of
from tests.support.runs import REPOSITORY, arguments, assert_refused, last_rows, losses, run_ranks

# Samples before each step: 0 4 8 16 28 44 60. After 8 samples one increment is due, after 16 two, after 24 all three.
RAMP = {"start": 4, "end": 16, "steps_of": 4, "ramp_tokens": 24 * 24}
STILL = {"lr": 1e-30, "weight_decay": 0.0}  # a step that leaves the initial weights as they are
SIZES = [4, 4, 8, 12, 16, 16]
STEPS, SEQ_LEN = len(SIZES), 24
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2_offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
}


def content(corpus: Corpus, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "out": str(out),
        "seed": 11,
        "model": {**LLAMA, "tie_word_embeddings": False},
        "tokenizer": str(corpus.tokenizer),
        "data": {"train": str(corpus.train), "seq_len": SEQ_LEN, "global_batch_size": RAMP, "micro_batch_size": 2},
        "steps": STEPS,
        "optim": {"lr": 4e-3, "eps": 1e-6, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "deepspeed": STAGES["zero3"],
        "checkpoint": {"interval_steps": 3, "keep_last": 10},
        "log": {"interval_steps": 1},
        **changes,
    }


def train(corpus: Corpus, base: Path, ranks: int = 2, **changes: Any) -> Path:
    """Train, and return the run's folder."""
    base.mkdir(exist_ok=True)
    file = base / "run.yaml"
    file.write_text(yaml.safe_dump(content(corpus, base, **changes)), encoding="utf-8")
    ended = run_ranks(arguments(file), base / "logs", ranks)
    assert ended.code == 0, ended.stderr
    return base / "run"


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(corpus, tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture(scope="module")
def dense(corpus: Corpus, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a LLaMA in plain torch on the same samples, in batches of `SIZES`."""
    first = train(
        corpus, tmp_path_factory.mktemp("first") / "base", steps=1, checkpoint={"interval_steps": 1}, optim=STILL
    )
    plan = make_plan(Config.model_validate(content(corpus, first.parent)), world_size=1)
    initial = {n: load() for n, load in master_weights(first / "checkpoints/step_00000001/deepspeed").items()}
    feed = plan.corpora.feed()
    reference, place, found = DenseLlama(settings_of(plan), initial, {}), 0, []
    for size in SIZES:
        found.append(reference.step(samples_of(feed, range(place, place + size)))["cross_entropy"])
        place += size
    feed.close()
    return found


def samples_of(feed: Feed, samples: range) -> torch.Tensor:
    """Return the tokens of samples of the run's order, (samples, SEQ_LEN + 1)."""
    rows = SampleRows(np.empty((len(samples), SEQ_LEN + 1), feed.dtype), None, None)
    feed.read(feed.at(np.array(samples)), rows)
    return torch.from_numpy(rows.tokens.astype("int64"))


def test_each_step_reads_as_many_samples_as_the_ramp_says(whole: Path) -> None:
    rows = last_rows(whole, "train")
    place = 0
    for step, size in enumerate(SIZES, start=1):
        assert (rows[step]["first_sample"], rows[step]["last_sample"]) == (place, place + size - 1)
        place += size
        assert rows[step]["tokens"] == place * SEQ_LEN


def test_losses_are_those_of_a_dense_process(whole: Path, dense: list[float]) -> None:
    assert list(losses(whole).values()) == pytest.approx(dense, rel=2e-6)


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "zero3"])
def test_every_stage_trains_so(corpus: Corpus, dense: list[float], tmp_path: Path, stage: str) -> None:
    folder = train(corpus, tmp_path / "base", deepspeed=STAGES[stage])
    assert list(losses(folder).values()) == pytest.approx(dense, rel=2e-6)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"sequence": 2}], ids=str)
def test_ranks_that_share_a_batch_train_so(corpus: Corpus, dense: list[float], tmp_path: Path, parallel: dict) -> None:
    folder = train(corpus, tmp_path / "base", deepspeed=STAGES["zero1"], parallel=parallel)
    assert list(losses(folder).values()) == pytest.approx(dense, rel=5e-6)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, id="the same ranks")])
def test_a_run_resumes_in_the_ramp(corpus: Corpus, whole: Path, tmp_path: Path, ranks: int) -> None:
    shutil.copytree(whole.parent, tmp_path / "base")
    folder = tmp_path / "base/run"
    shutil.rmtree(folder / "checkpoints/step_00000006")
    (folder / "checkpoints/latest").write_text("step_00000003\n", encoding="utf-8")
    train(corpus, tmp_path / "base", ranks)
    expected, found = losses(whole), losses(folder)
    assert found == expected if ranks == 2 else found == pytest.approx(expected, rel=1e-5)
    assert {s: row["last_sample"] for s, row in last_rows(folder, "train").items()} == {
        s: row["last_sample"] for s, row in last_rows(whole, "train").items()
    }


def test_the_audit_knows_the_samples_of_a_step(whole: Path) -> None:
    for options, expected in (
        (("--step", "4"), range(16, 28)),
        (("--step", "4", "--rank", "1", "--ranks", "2"), range(22, 28)),
        (("--sample", "27"), range(27, 28)),
    ):
        command = [sys.executable, "tools/inspect_data.py", "--config", str(whole / "config.yaml"), *options, "--json"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["step"] == 4
        assert [sample["sample"] for sample in found["samples"]] == list(expected)


def test_the_plan_says_how_the_batch_grows_and_how_many_steps_the_tokens_take(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    # 4 + 4 + 8 + 12 samples in the ramp's steps, and 16 in each step after them
    tokens = (4 + 4 + 8 + 12 + 16 * 3) * SEQ_LEN - 5
    config = content(corpus, tmp_path, tokens=tokens)
    del config["steps"]
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    ended = run_ranks(arguments(file, None, "--dry-run"), tmp_path / "logs", 2)
    assert ended.code == 0, ended.stderr
    assert "length    7 steps of 96 to 384 tokens = 1.82k tokens" in ended.stdout
    assert "; the first 4 steps, 576 tokens, take from 4 sequences on, 4 more at a time" in ended.stdout


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (
            {**RAMP, "start": 6, "end": 14},
            "data.global_batch_size.start 6 is not a multiple of data.micro_batch_size 2 x 2",
        ),
        ({**RAMP, "steps_of": 6}, "data.global_batch_size.steps_of 6 is not a multiple"),
        ({**RAMP, "end": 18}, "18 is not reached from 4 in steps of 4: take 16 or 20"),
        ({**RAMP, "end": 4}, "4 is not above start, 4"),
    ],
)
def test_ramps_that_do_not_fit_are_refused(corpus: Corpus, tmp_path: Path, ramp: dict, message: str) -> None:
    file = tmp_path / "run.yaml"
    config = content(corpus, tmp_path)
    config["data"]["global_batch_size"] = ramp
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert_refused(run_ranks(arguments(file), tmp_path / "logs", 2), message)


def test_another_ramp_is_another_order(corpus: Corpus, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent, tmp_path / "base")
    config = content(corpus, tmp_path / "base", steps=8)
    config["data"]["global_batch_size"] = {**RAMP, "ramp_tokens": 48}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    refused = run_ranks(arguments(file), tmp_path / "logs", 2)
    assert_refused(refused, "the sizes of its steps follow another ramp. Give back data.global_batch_size")
