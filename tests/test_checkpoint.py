"""Which checkpoint a run starts from, and what verification sees, on one rank and without a model."""

import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import Checkpoints, checkpoint_bytes, complete_checkpoints, verify
from pretrain.config import CheckpointSection
from pretrain.distributed import Ranks
from pretrain.errors import UserError
from pretrain.files import checksum

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (path / name).write_text(f"{name} of {step}")
    files = {n: {"bytes": (path / n).stat().st_size, "xxh3_128": checksum(path / n)} for n in ("a", "b", "c")}
    (path / "manifest.json").write_text(json.dumps({"saved_at": time.time(), "files": files}))
    return path


def found(folder: Path, resume: str) -> Path | None:
    return Checkpoints(folder, CheckpointSection(resume=resume), ALONE, print).find()


def test_a_requeued_job_goes_on_from_its_own_newest_checkpoint_whatever_it_was_started_from(tmp_path, monkeypatch):
    other, own = make_checkpoint(tmp_path / "other", 5), tmp_path / "own"
    assert found(own, str(other)) == other
    newest = make_checkpoint(own, 9)
    assert found(own, str(other)) == other
    assert found(own, "never") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert found(own, str(other)) == newest
    assert found(own, "never") == newest


def test_a_requeued_job_without_a_checkpoint_of_its_own_starts_as_the_first_time(tmp_path, monkeypatch):
    other = make_checkpoint(tmp_path / "other", 5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert found(tmp_path / "own", str(other)) == other
    assert found(tmp_path / "own", "never") is None


def test_ranks_share_verification_and_together_read_every_file(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    (path / "c").write_text("c of x")
    verify(path, rank=0, world_size=3)
    verify(path, rank=1, world_size=3)
    with pytest.raises(UserError, match="c does not match its checksum"):
        verify(path, rank=2, world_size=3)


def test_unfinished_and_doomed_folders_are_no_checkpoints(tmp_path):
    whole = make_checkpoint(tmp_path, 10)
    for name in (".step_00000020.incomplete", ".step_00000005.deleting", "step_x", "latest"):
        (tmp_path / name).mkdir()
    assert complete_checkpoints(tmp_path) == [whole]


def test_a_half_precision_checkpoint_takes_two_bytes_less_per_parameter():
    assert checkpoint_bytes(10**6, half=False) - checkpoint_bytes(10**6, half=True) == 2 * 10**6
