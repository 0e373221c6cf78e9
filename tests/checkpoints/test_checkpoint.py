"""The choice of the checkpoint that a run starts from, and verification, on one rank and without a model."""

import builtins
import errno
import json
import os
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoints import Checkpoints, TrainerState
from pretrain.checkpoints.deepspeed_files import put_steps_beside_moments
from pretrain.checkpoints.disk_space import checkpoint_bytes
from pretrain.checkpoints.folders import complete_checkpoints, put_in_place
from pretrain.checkpoints.manifest import verify
from pretrain.checkpoints.rng import random_states, restore_random_states
from pretrain.checkpoints.staging import Staging
from pretrain.checkpoints.state import read_matching_state, save_state
from pretrain.config.schema import CheckpointSection
from pretrain.distributed.ranks import Ranks
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
    assert checkpoint_bytes(10**6, 10**6, half=False) - checkpoint_bytes(10**6, 10**6, half=True) == 2 * 10**6


def flip(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").swapcase(), encoding="utf-8")


def test_a_run_goes_back_to_the_newest_whole_checkpoint_of_a_step_or_before(tmp_path):
    early, middle, late = (make_checkpoint(tmp_path, step) for step in (2, 5, 9))
    said = []
    checkpoints = Checkpoints(tmp_path, CheckpointSection(), ALONE, said.append)
    assert [checkpoints.find_before(step) for step in (1, 2, 4, 5, 8, 9, 99)] == [
        None, early, early, middle, middle, late, late
    ]  # fmt: skip
    flip(middle / "b")
    assert said == []
    assert checkpoints.find_before(8) == early
    assert len(said) == 1
    assert said[0].startswith(f"skipping a damaged checkpoint: {middle / 'b'} does not match")
    flip(early / "a")
    assert checkpoints.find_before(8) is None
    assert all(path.exists() for path in (early, middle, late))


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    """It also works after an attempt that did only the first rename, or did everything and seemed to fail."""
    for stage in range(3):
        folder = tmp_path / str(stage)
        old = make_checkpoint(folder, 5)
        (old / "a").write_text("old")
        aside = make_checkpoint(folder / "x", 5).rename(folder / ".step_00000005.incomplete")
        if stage > 0:
            old.rename(folder / ".step_00000005.deleting")
        if stage > 1:
            aside.rename(old)
        put_in_place(aside, old)
        verify(old)
        assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "x"]


class Disk:
    """Opens files as `open` does, but for the first `failures` times that `name` is opened."""

    def __init__(self, name: str, number: int, failures: int) -> None:
        self.name, self.number, self.failures, self.open = name, number, failures, open

    def __call__(self, path, *arguments, **options):
        if Path(path).name == self.name and self.failures > 0:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number), str(path))
        return self.open(path, *arguments, **options)


def test_storage_that_fails_for_a_moment_damages_no_checkpoint_and_one_that_stays_away_does(tmp_path, monkeypatch):
    old, new = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for number, failures, expected, pauses in (
        (errno.EIO, 3, new, [1, 2, 4]),
        (errno.ESTALE, 7, old, [1, 2, 4, 8, 15, 30]),
        (errno.EACCES, 1, old, []),
    ):
        slept.clear()
        disk = Disk("b", number, failures)
        monkeypatch.setattr(builtins, "open", disk)
        assert found(tmp_path, "auto") == expected
        monkeypatch.setattr(builtins, "open", disk.open)
        assert slept == pauses
    assert new.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"step": "5"}, "step: Input should be a valid integer"), ({"tempo": 3}, "tempo: "), ({"seed": None}, "seed: ")],
)
def test_a_state_of_another_trainer_is_refused_by_the_name_of_its_field(tmp_path, change, message):
    state = TrainerState(5, 40, 1, 3, "fp32", {}, "data", "tokenizer", 7, 32, 8)
    save_state(tmp_path, state)
    assert read_matching_state(tmp_path, state, ()) == state
    (tmp_path / "trainer.json").write_text(json.dumps(asdict(state) | change))
    with pytest.raises(UserError, match=f"trainer.json was written by another version of the trainer: {message}"):
        read_matching_state(tmp_path, state, ())


def test_random_states_come_back_through_a_file_that_runs_nothing(tmp_path):
    draw = lambda: (random.random(), np.random.rand(), float(torch.rand(())), random.gauss(0, 1), np.random.randn())  # noqa: E731
    draw()
    torch.save(random_states(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    restore_random_states(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_host_copy_keeps_values_and_shared_memory_and_nothing_of_the_original(tmp_path):
    flat = torch.arange(12.0)
    state = {
        "whole": flat,
        "part": flat[3:7].view(2, 2),
        "options": {"lr": 0.1, "betas": (0.9, 0.95)},
        "half": flat.bfloat16(),
    }
    copy = Staging().host_copy(state)
    flat.zero_()
    state["options"]["lr"] = 0.2
    assert torch.equal(copy["whole"], torch.arange(12.0))
    assert copy["part"].tolist() == [[3, 4], [5, 6]]
    assert copy["options"] == {"lr": 0.1, "betas": (0.9, 0.95)}
    assert torch.equal(copy["half"], torch.arange(12.0).bfloat16())
    copy["whole"][3] = 9
    assert copy["part"][0, 0] == 9


@pytest.mark.parametrize("fused", [True, None])
def test_step_counters_lie_where_a_fused_optimizer_reads_them(fused: bool | None) -> None:
    """Torch's own choice at the first step of a fused AdamW is the parameter's device. `meta` stands for the GPU."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=fused)
    moments = {name: torch.zeros(2, device="meta") for name in ("exp_avg", "exp_avg_sq")}
    states = optimizer.state
    states[torch.zeros(2)] = {"step": torch.tensor(3.0), **moments}
    states[torch.zeros(2)] = {"momentum_buffer": moments["exp_avg"]}  # Muon's, which counts no steps
    put_steps_beside_moments(optimizer)
    devices = [state["step"].device.type for state in states.values() if "step" in state]
    assert devices == (["meta"] if fused else ["cpu"])


def test_later_saves_are_copied_into_the_memory_of_the_first() -> None:
    staging = Staging()
    first = staging.host_copy({"a": torch.arange(300.0), "b": torch.ones(7, dtype=torch.bfloat16)})
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert [tensor.untyped_storage().nbytes() for tensor in first.values()] == [1200, 14]
    second = staging.host_copy({"a": torch.arange(300.0) + 1, "b": torch.zeros(7, dtype=torch.bfloat16)})
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses
    assert torch.equal(second["a"], torch.arange(300.0) + 1)
    assert not second["b"].any()
    larger = staging.host_copy({"a": torch.arange(3000.0)})
    assert torch.equal(larger["a"], torch.arange(3000.0))


def test_the_memory_of_saves_is_pinned_once_and_released_with_its_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA driver, which this machine may lack, that records each call."""
    registered: dict[int, int] = {}

    class Driver:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:
            registered[address] = size
            return 0

        @staticmethod
        def cudaHostUnregister(address: int) -> int:
            del registered[address]
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    staging = Staging()
    state = {"a": torch.arange(300.0), "b": torch.ones(7)}
    for _ in range(3):
        copy = staging.host_copy(state)
        assert list(registered.values()) == [1200 + 336 + 512]
    del staging
    assert registered
    assert torch.equal(copy["a"], state["a"])
    del copy
    assert not registered
