"""The samples of a run do not depend on the reading rank, the place, the format, or restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import open_shards
from pretrain.data.tokenizer import load_tokenizer_info
from pretrain.data.tokens.import_export import export_tokens, import_tokens
from tests.support.corpus import Corpus
from tests.support.faulty_server import FaultyServer, StorageFault
from tests.support.runs import arguments, assert_refused, last_rows, losses, rows, run_together

STEPS, BATCH = 4, 8
WINDOWS = {"scope": "windowed", "window_shards": 2}
OTHER_DATA = {"data.packing": "concatenate"}


@dataclass(frozen=True)
class Mode:
    """The same samples twice: read by one rank, and by two ranks, perhaps from another place."""

    one_rank: dict
    two_ranks: dict


@pytest.fixture(scope="module")
def server(corpus: Corpus) -> Iterator[FaultyServer]:
    """The training shards at /train; the first answer for one of them is damaged, for another slow."""
    with FaultyServer({f"/train/{path.name}": path.read_bytes() for path in corpus.train.iterdir()}) as server:
        server.faults["/train/shard_00001.bin"] = StorageFault("flip", times=1)
        server.faults["/train/shard_00002.bin"] = StorageFault("delay", delay_s=1.0, times=1)
        yield server


@pytest.fixture(scope="module")
def modes(corpus: Corpus, server: FaultyServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mode]:
    base = tmp_path_factory.mktemp("formats")
    own = open_shards(corpus.train)
    for format in ("megatron", "datatrove"):
        export_tokens(format, own, base / format)
    import_tokens("megatron", base / "megatron", base / "imported", load_tokenizer_info(corpus.tokenizer))
    mixture = {  # of 4 samples that a rank takes at a time, most have none of the second source
        "data.train": [{"path": str(corpus.train), "weight": 15}, {"path": str(corpus.val)}],
        "data.packing": "best_fit",
        "data.shuffle": WINDOWS,
        "data.cache.folder": str(base / "plans"),
    }
    within = {"data.document_attention": True, "data.shuffle": WINDOWS}
    remote = {"data.train": f"{server.url}/train", "data.cache": {"folder": str(base / "cache"), "limit_gb": 6e-5}}
    return {
        "mixed, packed, in windows": Mode(mixture, mixture),
        "within documents, remote": Mode(within, within | remote),
        "megatron": Mode({"data.train": str(base / "imported")}, {"data.train": str(base / "megatron/tokens")}),
        "datatrove": Mode({}, {"data.train": str(base / "datatrove")}),
    }


@pytest.fixture(scope="module")
def runs(run_file: Path, modes: dict[str, Mode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders `<mode>/one`, `<mode>/two` of each mode."""
    base = tmp_path_factory.mktemp("modes")
    commands = {}
    for name, mode in modes.items():
        common = {"out": str(base / name), "steps": STEPS, "checkpoint.interval_steps": 2, "eval.interval_steps": STEPS}
        one = common | {"name": "one", "data.micro_batch_size": BATCH} | mode.one_rank
        two = common | {"name": "two", "data.micro_batch_size": 2} | mode.two_ranks
        commands[f"{name}, one"] = (arguments(run_file, one), 1)
        commands[f"{name}, two"] = (arguments(run_file, two), 2)
    for name, ended in run_together(commands, base / "logs").items():
        assert ended.code == 0, f"{name}\n{ended.stdout}\n{ended.stderr}"
    return base


MODES = ("mixed, packed, in windows", "within documents, remote", "megatron", "datatrove")


@pytest.mark.parametrize("name", MODES)
def test_one_rank_and_two_train_on_the_same_samples(runs: Path, name: str) -> None:
    one, two = (losses(runs / name / ranks) for ranks in ("one", "two"))
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=2e-5)
    (evaluated, again) = (rows(runs / name / ranks, "eval") for ranks in ("one", "two"))
    assert evaluated[-1]["loss"] == pytest.approx(again[-1]["loss"], rel=2e-5)


def test_modes_train_on_different_samples(runs: Path) -> None:
    first = {name: losses(runs / name / "one")[1] for name in MODES}
    assert len(set(first.values())) == len(MODES)


def test_every_step_records_its_samples_and_the_epochs_of_each_source(runs: Path, corpus: Corpus) -> None:
    found = last_rows(runs / MODES[0] / "two", "train")
    for step, row in found.items():
        assert (row["first_sample"], row["last_sample"]) == ((step - 1) * BATCH, step * BATCH - 1)
    epochs = found[STEPS]["epochs"]
    assert set(epochs) == {str(corpus.train), str(corpus.val)}
    # Weights of 15 to 1, and validation shards of about a sixth of the training shards' size.
    assert 0 < epochs[str(corpus.val)] < epochs[str(corpus.train)] < 0.1


def test_a_damaged_download_was_fetched_again_and_no_rank_fetched_what_another_had(
    runs: Path, server: FaultyServer
) -> None:
    fetched = [path for path in server.requests if path.endswith(".bin")]
    assert fetched.count("/train/shard_00001.bin") <= 3  # its head by each rank at most, the damaged one, the good one
    assert server.requests.count("/train/manifest.json") == 2


def test_a_run_resumes_bit_for_bit_and_refuses_other_data(
    run_file: Path, runs: Path, modes: dict[str, Mode], tmp_path: Path
) -> None:
    name = MODES[0]
    whole = runs / name / "two"
    middle = str(whole / "checkpoints/step_00000002")
    again = {"out": str(tmp_path), "steps": STEPS, "checkpoint.resume": middle, "data.micro_batch_size": 2}
    commands = {
        kind: (arguments(run_file, again | {"name": kind} | modes[name].two_ranks | other), 2)
        for kind, other in {"same": {}, "other": OTHER_DATA}.items()
    }
    ended = run_together(commands, tmp_path / "logs")
    assert ended["same"].code == 0
    assert losses(tmp_path / "same") == {step: loss for step, loss in losses(whole).items() if step > 2}
    assert_refused(ended["other"], "it was trained on other data (data.packing: best_fit -> concatenate)")
