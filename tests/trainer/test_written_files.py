"""Files that replace others, whole or not at all. On a full disk they overwrite the old file in place."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from pretrain import files
from pretrain.distributed.ranks import Ranks
from pretrain.files import allocated_bytes, overwrite, write_text
from pretrain.trainer import run_folder
from pretrain.trainer.run_folder import RunFolder


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give new files no room on the disk."""

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(path: Path, value: object) -> None:
        with monkeypatch.context() as context:
            context.setattr(files.os, "fsync", no_room)
            files.write_text(path, json.dumps(value))

    monkeypatch.setattr(run_folder, "write_json", replace)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "file", "new")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("text", ["", "short", "as long as it was", "longer than what is to be replaced"])
def test_a_file_is_overwritten_in_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text("it was as long as", encoding="utf-8")
    before = path.stat().st_ino
    overwrite(path, text)
    assert path.read_text(encoding="utf-8") == text
    assert path.stat().st_ino == before


@pytest.mark.parametrize("reason", ["no room", "no room " * 10_000])
def test_the_status_is_recorded_on_a_full_disk(tmp_path: Path, full: None, reason: str) -> None:
    folder = RunFolder(tmp_path / "run", Ranks(0, 0, 1, torch.device("cpu")))
    write_text(tmp_path / "run/status.json", json.dumps({"status": "running", "step": 3, "reason": ""}))
    folder.begun, folder.step = True, 5
    room = allocated_bytes(tmp_path / "run/status.json")
    folder.fail(reason, 2)
    found = json.loads((tmp_path / "run/status.json").read_text(encoding="utf-8"))
    assert (found["status"], found["step"], found["exit_code"]) == ("failed", 5, 2)
    assert reason.startswith(found["reason"])
    assert found["reason"]
    assert (tmp_path / "run/status.json").stat().st_size <= room
    assert not list((tmp_path / "run").rglob(".*.tmp"))
