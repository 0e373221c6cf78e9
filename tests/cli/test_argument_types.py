"""Arguments of command lines: paths that a script has quoted, and texts that are no numbers."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cli import argument_types
from tests.support.runs import REPOSITORY


def test_variables_in_paths_are_filled_in_if_no_shell_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert argument_types.path("~/x") == Path("/home/me/x")
    assert argument_types.path("${SCRATCH}/x") == Path("/scratch/me/x")
    assert argument_types.location("$SCRATCH/*.jsonl") == "/scratch/me/*.jsonl"
    assert argument_types.location("s3://bucket/$x") == "s3://bucket/$x"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (argument_types.whole(1), "12", 12),
        (argument_types.whole(1), "1e9", 10**9),
        (argument_types.whole(), "-3", -3),
        (argument_types.whole(1), "1_000", 1000),
        (argument_types.whole(1), "9007199254740993", 9007199254740993),  # beyond what a float counts one by one
        (argument_types.number(above=0), "1e-3", 1e-3),
    ],
)
def test_numbers_are_read_as_they_are_written(kind: Callable, text: str, expected: float) -> None:
    assert kind(text) == expected


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (argument_types.whole(1), ("0", "-1", "1.5", "nan", "inf", "1e400", "1e30", "", "many", "true")),
        (argument_types.number(above=0), ("0", "-1", "nan", "inf", "-inf", "1e400", "", "true")),
        (argument_types.number(least=0), ("-1", "nan", "inf")),
        (argument_types.path, ("", "$UNSET/x", "~no_such_user/x", "s3://bucket/x", "a\0b", "x" * 300)),
        (argument_types.location, ("", "$UNSET/x", "~no_such_user/x", "x" * 300)),
    ],
)
def test_a_text_that_is_no_number_or_no_path_is_refused(
    kind: Callable, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_no_tool_parses_a_path_or_a_number_by_pythons_own_types() -> None:
    """Path("~/x") would be a folder named ~, and float("nan") a number."""
    scripts = [
        path.read_text()
        for folder in ("tools", "pretrain/cli", "benchmarks")
        for path in (REPOSITORY / folder).glob("*.py")
    ]
    assert not [found for text in scripts for found in re.findall(r"type=(?:Path|int)\b", text)]


def test_a_tool_reports_what_is_wrong_with_its_arguments() -> None:
    words = ["tools/train_tokenizer.py", "--source", "stdlib", "--out", "$NOWHERE/x", "--max-bytes", "nan"]
    ended = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "argument --out: '$NOWHERE/x': $NOWHERE is not set here" in ended.stderr
