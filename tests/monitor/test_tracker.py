"""The tracker with processes in wandb's place that fail, hang, and work again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config.schema import WandbSection
from pretrain.monitor import tracker
from pretrain.monitor.tracker import Tracker, describe, mode_of
from pretrain.monitor.wandb_session import reason_of

OFF, ON = """echo '{"off": "away"}'; exit 1""", """echo '{"on": "there"}'"""
TAKES_ALL, HANGS = f"{ON}; cat > /dev/null", f"{ON}; sleep 100"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tracker, list]]:
    """Return a function that makes a tracker whose processes run the given shell commands in turn, the last one repeatedly."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tracker, "RETRY_S", 0.01)

    def made(*scripts: str) -> tuple[Tracker, list]:
        cases = "".join(f"{number}) {script};;\n" for number, script in enumerate(scripts[:-1], start=1))
        count = "n=$(($(cat count 2>/dev/null || echo 0) + 1)); echo $n > count\ncase $n in\n"
        stand_in = tmp_path / "stand_in"
        stand_in.write_text(f"#!/bin/bash\ncd {tmp_path}\n{count}{cases}*) {scripts[-1]};;\nesac\n")
        stand_in.chmod(0o755)
        monkeypatch.setattr(tracker.sys, "executable", str(stand_in))
        announced: list = []
        return Tracker(tmp_path, "online", lambda *words: announced.append(words)), announced

    return made


def look_until(found: Tracker, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        began = time.monotonic()
        found.look()
        assert time.monotonic() - began < 5, "training waited"
        time.sleep(0.01)


def test_attempts_come_with_growing_pauses_and_each_change_is_announced_once(start: Callable, tmp_path: Path) -> None:
    found, announced = start(OFF, OFF, "exit 7", TAKES_ALL)
    look_until(found, lambda: len(announced) == 2)
    assert announced == [("tracking_off", "away"), ("tracking_on", "there")]
    assert (tmp_path / "count").read_text() == "4\n"
    assert found._pause_s == pytest.approx(0.01 * 2**3)
    found.close(60)
    assert len(announced) == 2


def test_a_process_that_does_not_begin_is_given_up(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "START_S", 0.2)
    found, announced = start("sleep 100")
    look_until(found, lambda: bool(announced))
    assert announced == [("tracking_off", "wandb has not begun within 0 s")]
    found.close(0)


def test_close_waits_for_a_process_that_hangs_no_longer_than_allowed(start: Callable) -> None:
    found, announced = start(HANGS)
    look_until(found, lambda: found._works is True)
    process = found._process
    found.close(0.2)
    assert announced == [("tracking_off", "wandb has not taken all rows within 0 s")]
    assert process.poll() is not None


def test_a_process_that_cannot_be_started_turns_tracking_off(
    start: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start(OFF)
    monkeypatch.setattr(tracker.sys, "executable", str(tmp_path / "nothing"))
    announced: list = []
    Tracker(tmp_path, "online", lambda *words: announced.append(words))
    [(event, reason)] = announced
    assert event == "tracking_off"
    assert "No such file" in reason


@pytest.mark.parametrize(
    ("in_file", "variable", "mode"),
    [
        ("offline", None, "offline"),
        ("online", "", "online"),
        ("online", "offline", "offline"),
        ("offline", "online", "online"),
        ("online", "disabled", "disabled"),
        ("online", "dryrun", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_the_environment_sets_how_a_run_is_tracked_and_the_run_file_if_it_is(
    in_file: str, variable: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert mode_of(WandbSection(mode=in_file)) == mode


def test_the_plan_names_what_stands_in_the_way_of_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert describe(WandbSection(mode="offline")) == "wandb offline, project evenkeel"
    assert "there is no key for it" in describe(WandbSection(mode="online"))
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert "WANDB_MODE is 'ofline': only online and offline track a run" in describe(WandbSection(mode="online"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb offline (by WANDB_MODE)" in describe(WandbSection(mode="online"))
    assert "the package wandb does not work here" in describe(WandbSection(mode="online"))


def test_an_error_of_several_lines_is_reported_on_one() -> None:
    error = ValueError("1 validation error for Settings\nbase_url\n  Input should be a URL, got 'nonsense'.")
    assert reason_of(error) == "1 validation error for Settings base_url Input should be a URL, got 'nonsense'"
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
