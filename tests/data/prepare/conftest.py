"""A small corpus in four files, and fixtures that prepare it in many small steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.data.tokenizer import TokenizerInfo, load_tokenizer_info


@pytest.fixture(scope="session")
def texts(library_texts: list[str]) -> list[str]:
    """200 documents of mixed length, some of them hard."""
    paragraphs = [part for text in library_texts for part in text.split("\n\n") if part][:195]
    return [*paragraphs, "", "</s> is text here", "\ud800 half a surrogate", "x" * 5000, "漢字 🎉"]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> str:
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in texts[number * 50 : number * 50 + 50]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "*.jsonl")


@pytest.fixture(scope="session")
def tokenizer_info(tokenizer_folder: Path) -> TokenizerInfo:
    return load_tokenizer_info(tokenizer_folder)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make units of work of a few documents, so that there are places to stop at."""
    monkeypatch.setattr("pretrain.data.text.readers.BLOCK_BYTES", 2000)
    monkeypatch.setattr("pretrain.data.prepare.encoding.UNIT_BYTES", 2000)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the journal after every unit of work."""
    monkeypatch.setattr("pretrain.data.prepare.journal.COMMIT_INTERVAL_S", 0.0)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: only processes stop here, no machine does, and waiting for the disk would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
