"""Command lines: the texts come out of the shards, decoded by the tokenizers library; those left out are printed."""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tests.support.prepared import manifest_of
from tests.support.prepared import texts_of as decoded

TOOLS = Path(__file__).parents[3] / "tools"


def _run(tool: str, *options: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOLS / tool, *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture
def fixed(tokenizer_folder: Path) -> list[str]:
    """The options of every preparation here: to the folder out, without validation."""
    return ["--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--out", "out"]


@pytest.fixture
def prepare(fixed: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """prepare(option, ...): run the tool in tmp_path."""
    return lambda *options: _run("prepare_data.py", *fixed, *options, cwd=tmp_path)


def test_records_without_text_late_in_a_file_are_explained_left_out_and_listed(
    prepare, tmp_path: Path, tokenizer
) -> None:
    texts = [f"some words {number}" for number in range(5000)]
    bad = [
        {"content": "oops"},
        {"text": 5, "language": "en"},
        {"text": None, "language": "en"},
        {"text": "no language"},
    ]
    lines = [*({"text": text, "language": "en"} for text in texts), *bad, {"text": "deutsch", "language": "de"}]
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    stopped = prepare("--source", "late.jsonl")
    assert stopped.returncode == 2
    assert (
        "error: late.jsonl, line 5001, has no field 'text'; its fields are content, although the 5,000"
        in stopped.stderr
    )
    assert stopped.stderr.endswith("--skip-unreadable leaves such records out, and lists them.\n")
    done = prepare("--source", "late.jsonl", "--skip-unreadable", "--filter", "language=en", "--out", "other")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "other/train", tokenizer) == texts
    assert "  left out, of 5,005 records: 1 by --filter, 4 without text or unreadable (named in" in done.stdout
    assert manifest_of(tmp_path / "other/train")["unreadable"] == [f"late.jsonl, line {5001 + n}" for n in range(4)]


def test_a_text_file_keeps_what_stands_before_damage_and_loses_its_mark(prepare, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"good line\n" * 1000 + b"caf\xe9\nlost\n")
    stopped = prepare("--source", "a.txt")
    assert (stopped.returncode, "a.txt, from byte 10006: it is not UTF-8" in stopped.stderr) == (2, True)
    done = prepare("--source", "a.txt", "--skip-unreadable")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out/train", tokenizer) == ["good line\n" * 1000 + "caf"]


def test_a_folder_is_read_as_its_line_says(prepare, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "repo/en").mkdir(parents=True)
    contents = {
        "en/x.json": '[{"text": "in an array"}]',
        "en/empty.jsonl": "",
        "book.txt": "a book",
        "c4.py": "import datasets",
    }
    for name, content in contents.items():
        (tmp_path / "repo" / name).write_text(content, encoding="utf-8")
    done = prepare("--source", "repo")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out/train", tokenizer) == ["a book", "in an array"]
    assert done.stderr.startswith("--source repo reads 3 files (.json 1, .jsonl 1, .txt 1); leaves out 1: .py (code ")
    assert "without text: 1 of 3 files (repo/en/empty.jsonl)\n" in done.stderr
    (tmp_path / "repo/en/gone.jsonl").symlink_to("nowhere")
    broken = prepare("--source", "repo/*", "--out", "other")
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: repo/en/gone.jsonl is a link to nowhere, which is not there")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_file_that_grows_while_it_is_prepared_is_noticed(prepare, fixed: list[str], tmp_path: Path) -> None:
    """The writer is another process, which appends as soon as the preparation says that it has begun to read."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n' * 600_000, encoding="utf-8")
    command = [sys.executable, str(TOOLS / "prepare_data.py"), *fixed, "--source", "a.jsonl", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr.readline().startswith("--source a.jsonl reads 1 file")
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
        errors = process.stderr.read()
    assert process.returncode == 2
    assert (
        "a.jsonl has changed while it was read: it had 13,800,000 bytes when it was listed, and has 13,800,017"
        in errors
    )
    again = prepare("--source", "a.jsonl")
    assert again.returncode == 2
    assert "the source files have changed" in again.stderr


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for number in range(30):
            text = " ".join(f"word{(number * 7919 + n) % 3000}" for n in range(4000))
            file.write(json.dumps({"text": text if number % 2 else f"{text[:900]} \u2585 {text[:900]}"}) + "\n")
    done = _run("train_tokenizer.py", "--source", "a.jsonl", "--vocab-size", 280, "--out", "tok", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cut 30 lines that SentencePiece would drop into shorter ones" in done.stderr
    tokens = Tokenizer.from_file(str(tmp_path / "tok/tokenizer.json")).encode("word12 word345").tokens
    assert tokens == ["word", "1", "2", "▁word", "3", "4", "5"]


def test_a_tokenizer_is_told_what_its_source_is_told(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number} of words {number * 7919}"}) for number in range(4000)]
    lines[3000] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = ("--source", "a.jsonl", "--vocab-size", 300, "--out", "tok")
    stopped = _run("train_tokenizer.py", *options, cwd=tmp_path)
    assert stopped.returncode == 2
    assert "error: cannot read a.jsonl, line 3001: it is not JSON" in stopped.stderr
    assert "vocabulary" not in stopped.stderr
    assert not (tmp_path / "tok").exists()
    done = _run("train_tokenizer.py", *options, "--skip-unreadable", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out: cannot read a.jsonl, line 3001" in done.stderr


def test_ctrl_c_ends_the_training_of_a_tokenizer_and_leaves_nothing(tmp_path: Path) -> None:
    letters = random.Random(0)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for _ in range(300_000):  # SentencePiece takes 20 s or more to merge so many different words
            words = ("".join(letters.choices(string.ascii_lowercase, k=12)) for _ in range(6))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    options = ["--source", "a.jsonl", "--vocab-size", "30000", "--max-bytes", "1e9", "--out", "tok"]
    for pause_s in (0.0, 0.3, 3.0):  # as the libraries load or text is read, and as SentencePiece is at work
        command = [sys.executable, str(TOOLS / "train_tokenizer.py"), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            assert process.stderr.readline().startswith("--source a.jsonl reads 1 file")
            time.sleep(pause_s)
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read()
        assert (process.returncode, "error" in errors, "Traceback" in errors) == (130, False, False), errors
        assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "config", "named", "message"),
    [
        ({"id": 20}, {}, {}, "tokenizer.json gives the token '</s>' the id 20, and the libraries give it 3"),
        ({}, {"eos_token": "<|end|>"}, {}, "_config.json names '<|end|>' as eos_token, which ends every document, and"),
        ({}, {"bos_token": "<|b|>", "add_bos_token": True}, {}, "names '<|b|>' as bos_token, which begins every"),
        ({}, {"eos_token": None}, {"eos_token": "<|end|>"}, "special_tokens_map.json names '<|end|>' as eos_token"),
        (
            {},
            {"added_tokens_decoder": {"9": {"content": "<x>"}}},
            {},
            "gives the token '<x>' the id 9, and the libraries",
        ),
    ],
)
def test_tokens_whose_ids_are_not_what_the_files_say_are_refused(
    tmp_path: Path, changes: dict, config: dict, named: dict, message: str
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    tokenizer.add_special_tokens(["</s>"])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][0] |= changes
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | config
    (tmp_path / "tok/tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if named:
        (tmp_path / "tok/special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    done = _run("prepare_data.py", "--source", "a.txt", "--tokenizer", "tok", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True), done.stderr
    assert message in done.stderr
