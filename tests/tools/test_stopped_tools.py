"""A command line that gets a signal to end leaves no unfinished file and no child, whatever its main thread is doing."""

from __future__ import annotations

import os
import random
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.runs import REPOSITORY

HEAD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pretrain import startup
startup.begin()
from pretrain.cli import command
from pretrain.files import unfinished

def main():
    with unfinished(Path("half")) as folder:
        folder.mkdir()
        (folder / "file").write_text("x")
        work()

"""
SLEEPS = HEAD + "def work(): time.sleep(100)\ncommand.run(main)"
# Some libraries turn the exception of a callback into another one.
SWALLOWS = HEAD + (
    "def work():\n    try:\n        time.sleep(100)\n    except BaseException:\n"
    "        raise RuntimeError('not enough text') from None\ncommand.run(main)"
)
# A mutex that its own thread waits for: no signal interrupts that, so Python's handlers do not run.
BLOCKED = HEAD + (
    "import ctypes\ncommand.PATIENCE_S = 1.0\n"
    "def work():\n    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)\n"
    "    c.pthread_mutex_init(mutex, None)\n    c.pthread_mutex_lock(mutex)\n    c.pthread_mutex_lock(mutex)\ncommand.run(main)"
)
HAS_CHILD = HEAD + (
    "import subprocess\n"
    "child = 'trap \"sleep 0.5; echo stopped > stopped; exit\" TERM; echo > ready; while :; do sleep 0.1; done'\n"
    "def work(): subprocess.run(['bash', '-c', child], check=False)\ncommand.run(main)"
)


def under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def start(script: str, folder: Path, prepare: Callable[[], None] | None = None) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(REPOSITORY)],
        cwd=folder,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=prepare,
    )
    wait_until(lambda: (folder / "half/file").exists() or process.poll() is not None)
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: subprocess.Popen, number: int) -> str:
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    return errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_a_command_line_and_what_is_half_written_goes(tmp_path: Path, number: signal.Signals) -> None:
    assert end(start(SLEEPS, tmp_path), number) == f"stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_stop_is_no_fault_of_the_input_whatever_a_library_makes_of_it(tmp_path: Path) -> None:
    assert end(start(SWALLOWS, tmp_path), signal.SIGINT) == "stopped by SIGINT\n"


def test_a_signal_is_heard_while_a_library_keeps_the_main_thread(tmp_path: Path) -> None:
    end(start(BLOCKED, tmp_path), signal.SIGHUP)
    assert list(tmp_path.iterdir()) == []


def test_nohup_keeps_a_command_line_alive(tmp_path: Path) -> None:
    process = start(SLEEPS, tmp_path, prepare=under_nohup)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    end(process, signal.SIGTERM)


@pytest.mark.slow
def test_the_processes_of_a_command_line_end_before_it_does(tmp_path: Path) -> None:
    process = start(HAS_CHILD, tmp_path)
    wait_until((tmp_path / "ready").exists)
    (child,) = psutil.Process(process.pid).children()
    end(process, signal.SIGHUP)
    assert (tmp_path / "stopped").read_text(encoding="utf-8") == "stopped\n"
    assert not child.is_running()


@pytest.mark.slow
def test_the_training_of_a_tokenizer_hears_a_signal_and_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = tmp_path_factory.mktemp("text") / "words.txt"
    draw = random.Random(0)  # words that all differ keep SentencePiece busy for minutes
    letters = string.ascii_lowercase
    text.write_text("\n".join(" ".join("".join(draw.choices(letters, k=9)) for _ in range(9)) for _ in range(200_000)))
    words = [
        "--source",
        str(text),
        "--max-bytes",
        "100e6",
        "--vocab-size",
        "60000",
        "--out",
        str(tmp_path / "tokenizer"),
    ]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools/train_tokenizer.py"), *words],
        env=os.environ | {"HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    time.sleep(15)
    assert process.poll() is None, "it was too quick for this test"
    began = time.monotonic()
    end(process, signal.SIGHUP)
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []
