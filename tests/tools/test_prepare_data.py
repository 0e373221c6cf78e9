"""tools/prepare_data.py as a user runs it, killed with SIGKILL too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data import check_tokenizer, load_tokenizer, open_shards

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    command = [TOOLS / "train_tokenizer.py", "--source", TOOLS, "--vocab-size", "600", "--out", folder]
    subprocess.run([sys.executable, *command], check=True, timeout=120)
    return folder


# The tool as it is, except that it records its progress after every unit of work: fast machines need no second for one.
EAGER = """
import runpy, sys
import pretrain.data.prepare.preparation
pretrain.data.prepare.preparation.COMMIT_INTERVAL_S = 0.0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _command(tokenizer_folder: Path, out: Path, *options: object) -> list[str]:
    fixed = ["--source", "stdlib", "--tokenizer", tokenizer_folder, "--out", out]
    return [sys.executable, *map(str, [TOOLS / "prepare_data.py", *fixed, *options])]


def _run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


def test_a_preparation_killed_twice_ends_with_the_same_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = ("--shard-tokens", 700_000, "--max-tokens", 3_000_000)
    whole = _run(*_command(tokenizer_folder, tmp_path / "whole", *sizes, "--workers", 1))
    assert whole.returncode == 0, whole.stderr

    command = _command(tokenizer_folder, tmp_path / "killed", *sizes, "--workers", 2)
    eager = [command[0], "-c", EAGER, *command[1:]]
    reached = [_kill_after_progress(eager, tmp_path / "killed"), _kill_after_progress(eager, tmp_path / "killed")]
    assert [0, 0] < reached[0] < reached[1], "the second attempt did not go on from the first"

    last = _run(*command)
    assert last.returncode == 0, last.stderr
    assert last.stdout == whole.stdout.replace(str(tmp_path / "whole"), str(tmp_path / "killed"))
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")
    again = _run(*command)
    assert (again.returncode, again.stdout) == (0, last.stdout)

    shards = open_shards(tmp_path / "killed" / "train")
    assert len(shards.shards) > 3
    check_tokenizer(shards, load_tokenizer(tokenizer_folder), tmp_path)


def test_mistakes_end_with_code_2_and_one_paragraph(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for options, message in [
        (("--source", tmp_path / "a.csv"), "a.csv is of no kind that can be read"),
        (("--tokenizer", tmp_path / "nowhere"), "there is no tokenizer at"),
        (("--out", TOOLS), "holds files that no preparation recorded"),
        (("--val-fraction", 1.5), "--val-fraction 1.5 is not a share"),
        (("--shard-tokens", 0), "--shard-tokens 0 is too small"),
    ]:
        done = _run(*_command(tokenizer_folder, tmp_path / "out", *options))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def _kill_after_progress(command: list[str], out: Path) -> list[int]:
    """Run `command`, kill it with SIGKILL once it has recorded progress of its own; the cursor it had recorded."""
    before = _cursor(out)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: process.poll() is not None or _cursor(out) > before)
        workers = _descendants(process.pid)
        assert process.poll() is None, "it ended before it could be killed"
        assert len(workers) >= 2
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    _wait_until(lambda: not any(map(_is_running, workers)))
    return _cursor(out)


def _cursor(out: Path) -> list[int]:
    journal = out / "prepare.json"
    return (json.loads(journal.read_text())["cursor"] if journal.exists() else None) or [0, 0]


def _descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _contents(out: Path) -> dict[str, bytes]:
    files = [file for split in ("train", "val") for file in (out / split).iterdir()]
    return {os.fspath(file.relative_to(out)): file.read_bytes() for file in files}
