"""Files of whole lines on disks that are full for some time."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from pretrain.monitor import lines
from pretrain.monitor.lines import Lines, LogFile, end_last_line
from pretrain.optional import optional


@pytest.fixture(autouse=True)
def propagated_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest see the log, whatever another test of this process has done to it."""
    monkeypatch.setattr(logging.getLogger("evenkeel"), "propagate", True)


class Disk:
    """A disk that takes `room` bytes, with a part of the last write, and then reports that it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self._write = 1 << 30, os.write
        monkeypatch.setattr(lines.os, "write", self.write)

    def write(self, descriptor: int, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = content[: self.room]
        self.room -= len(taken)
        return self._write(descriptor, taken)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_line_that_does_not_fit_waits_and_no_part_of_it_is_on_the_disk(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = Lines(path)
    rows.append("one")
    disk.room = 6
    rows.append("four")
    rows.append("five")
    assert path.read_text() == "one\nfour\n"
    assert (rows.waiting, rows.fault.errno) == (1, errno.ENOSPC)
    disk.room = 1000
    rows.append("six")
    assert path.read_text() == "one\nfour\nfive\nsix\n"
    assert (rows.waiting, rows.fault) == (0, None)


def test_a_partial_line_that_cannot_be_removed_at_once_is_removed_later(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows"
    rows = Lines(path)
    rows.append("one")
    truncate = os.ftruncate

    def fail(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lines.os, "ftruncate", fail)
    disk.room = 2
    rows.append("two")
    assert path.read_text() == "one\ntw"
    monkeypatch.setattr(lines.os, "ftruncate", truncate)
    disk.room = 1000
    rows.append("three")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_the_oldest_lines_are_dropped_when_too_many_wait(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "KEPT_BYTES", 10)
    rows = Lines(tmp_path / "rows")
    disk.room = 0
    for line in ("aaaa", "bbbb", "cccc"):
        rows.append(line)
    disk.room = 1000
    rows.flush()
    assert (tmp_path / "rows").read_text() == "bbbb\ncccc\n"
    assert rows.lost == 1


@pytest.mark.parametrize("whole", ["", "one\n", "x" * 200_000 + "\n"])
@pytest.mark.parametrize("torn", ["", "tw", "y" * 200_000])
def test_only_a_half_written_last_line_is_dropped(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "rows"
    path.write_text(whole + torn)
    end_last_line(path)
    assert path.read_text() == whole
    rows = Lines(path)
    rows.append("next")
    assert path.read_text() == whole + "next\n"


def test_a_log_file_warns_on_the_other_handlers_that_its_lines_wait(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("evenkeel")
    handler = LogFile(tmp_path / "log")
    log.addHandler(handler)
    try:
        disk.room = 0
        for message in ("one", "two"):
            log.warning(message)
        assert [record.message for record in caplog.records if "No space left" in record.message] != []
        assert sum("No space left" in record.message for record in caplog.records) == 1
        disk.room = 1000
        log.warning("three")
    finally:
        log.removeHandler(handler)
    assert [line for line in (tmp_path / "log").read_text().splitlines() if "cannot" not in line] == [
        "one",
        "two",
        "three",
    ]


def test_an_optional_failure_is_logged_once_for_each_kind_and_a_request_to_stop_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(3):
        with optional("a kind", "it could not be done"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert [record.message for record in caplog.records] == [
        "it could not be done: [Errno 5] Input/output error. The run continues."
    ]
    for asked in (KeyboardInterrupt, SystemExit):
        with pytest.raises(asked), optional("a kind", "it could not be done"):
            raise asked
