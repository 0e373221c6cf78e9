"""Whole runs that resume on another number of ranks: killed while they load, and from checkpoints that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pretrain.files import checksum
from tests.support.runs import arguments, assert_refused, contents, events, last_rows, losses, run_ranks, run_together

ZERO1 = {"zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def whole(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of eight steps on two ranks at ZeRO-3, with a checkpoint of step 4."""
    base = tmp_path_factory.mktemp("whole")
    assert run_ranks(arguments(run_file, {"out": str(base), "name": "whole"}), base / "logs").code == 0
    return base / "whole"


def halved(whole: Path, folder: Path) -> Path:
    """Return a copy of the run as it was at step 4."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step_00000008")
    (folder / "checkpoints/latest").write_text("step_00000004\n")
    return folder


def killed_at_the_third_read() -> None:
    """Let this process kill itself while it reads a checkpoint of another layout."""
    from pretrain.checkpoints.stored import StoredTensor

    read, count = StoredTensor.read_into, iter(range(3))

    def counted(*arguments: object) -> None:
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        read(*arguments)  # type: ignore[arg-type]

    StoredTensor.read_into = counted  # type: ignore[method-assign, assignment]


def test_a_run_that_is_killed_while_it_loads_another_layout_continues_afterwards(
    run_file: Path, whole: Path, tmp_path: Path
) -> None:
    folder = halved(whole, tmp_path / "run")
    checkpoint = contents(folder / "checkpoints")
    words = arguments(run_file, {"out": str(tmp_path), "name": "run", "deepspeed": ZERO1})
    assert run_ranks(words, tmp_path / "logs", 1, prepare=killed_at_the_third_read).code == -signal.SIGKILL
    assert contents(folder / "checkpoints") == checkpoint
    ended = run_ranks(words, tmp_path / "logs", 1)
    assert ended.code == 0, ended.stderr
    assert "ranks 2 -> 1, ZeRO stage 3 -> 1" in ended.stdout
    assert [event["step"] for event in events(folder, "resumed")] == [4]
    assert list(losses(folder)) == list(range(1, 9))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
    for step, row in last_rows(folder, "train").items():
        expected = last_rows(whole, "train")[step]
        assert (row["first_sample"], row["last_sample"]) == (expected["first_sample"], expected["last_sample"])


def list_again(checkpoint: Path) -> None:
    """Make the manifest one of the files that are there."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    del files["manifest.json"]
    manifest["files"] = {n: {"bytes": p.stat().st_size, "xxh3_128": checksum(p)} for n, p in files.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def lack_a_piece(checkpoint: Path) -> None:
    (checkpoint / "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    list_again(checkpoint)


def change_a_piece(checkpoint: Path) -> None:
    path = checkpoint / "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def be_newer(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer.json").read_text())
    (checkpoint / "trainer.json").write_text(json.dumps(state | {"of_the_future": 1}))
    list_again(checkpoint)


# name: (what is done to the checkpoint, what is changed in the run, what the message says)
REFUSALS = {
    "a piece is missing": (lack_a_piece, {}, ("was written by 2 ranks but holds the optimizer states of 1",)),
    "a checksum differs": (change_a_piece, {}, ("zero_pp_rank_1", "does not match its checksum")),
    "a newer format": (be_newer, {}, ("trainer.json was written by another version", "of_the_future")),
    "another model": (None, {"model.num_hidden_layers": 3}, ("another architecture", "num_hidden_layers")),
    "another optimizer": (None, {"optim.name": "muon", "optim.grad_clip": None}, ("adamw, this run muon",)),
    "a batch that does not divide": (None, {"data.micro_batch_size": 3}, ("data.micro_batch_size to 2, the nearest",)),
}


@pytest.fixture(scope="module")
def refused(run_file: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return for each refusal the output of the ranks, and the run folder's contents before and after."""
    base = tmp_path_factory.mktemp("refused")
    commands, folders, before = {}, {}, {}
    for number, (name, (damage, change, _)) in enumerate(REFUSALS.items()):
        folder = folders[name] = halved(whole, base / str(number) / "run")
        if damage:
            damage(folder / "checkpoints/step_00000004")
        before[name] = contents(folder)
        commands[name] = (arguments(run_file, {"out": str(folder.parent), "name": "run", **change}), 1)
    ended = run_together(commands, base / "logs")
    return {name: (ended[name], before[name], contents(folders[name])) for name in REFUSALS}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_loaded_is_refused_before_anything_is_written(refused: dict, name: str) -> None:
    ended, before, after = refused[name]
    assert_refused(ended, *REFUSALS[name][-1])
    assert after == before
