"""tools/train_tokenizer.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, LlamaConfig

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


def run(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, options)], capture_output=True, text=True, timeout=120)


def test_a_folder_that_transformers_loads_and_runs_leave_alone(tmp_path: Path) -> None:
    out = tmp_path / "a" / "tokenizer"
    command = ("--source", "stdlib", "--vocab-size", 600, "--max-bytes", 1e6, "--out", out)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert not list(out.parent.glob(".*")), "temporary files are left"

    LlamaConfig().save_pretrained(out)  # converted models keep their tokenizer beside a config.json
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    text = TOOL.read_text()
    assert len(tokenizer) == 600
    assert tokenizer(text)["input_ids"] == processor.encode(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    before = _contents(out)
    again = run(*command)
    assert (again.returncode, again.stdout) == (0, f"complete already: {out}\n")
    other = run(*command[:3], 700, *command[4:])
    assert other.returncode == 2
    assert "was not made by this very command" in other.stderr
    assert _contents(out) == before


def test_the_same_command_makes_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("--source", TOOL, "--vocab-size", 400, "--out", tmp_path / name).returncode == 0
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_mistakes_end_with_code_2_and_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for options, message in [
        (("--source", TOOL, "--out", tmp_path / "full"), "is left as it is"),
        (("--source", tmp_path / "nothing", "--out", tmp_path / "out"), "matches no file"),
        (("--source", TOOL, "--vocab-size", 100000, "--out", tmp_path / "out"), "vocabulary of 100000"),
        (("--source", TOOL, "--vocab-size", 400, "--out", tmp_path / "full" / "thesis.tex" / "x"), "cannot write"),
    ]:
        done = run(*options)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert _contents(tmp_path / "full") == {"thesis.tex": b"years of work"}
    assert not (tmp_path / "out").exists()


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
