"""The two measurements of the data path count correctly; their times are not tested."""

from __future__ import annotations

import hashlib
import json
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import data, tokenize
from benchmarks.rivals import known_rivals, missing_modules
from benchmarks.usage import measure
from pretrain.errors import UserError

# Two processes that each hold 40 MB and compute for half a second; the second is an orphan when the first ends.
TREE = """
import os, time
held = bytearray(os.urandom(40_000_000))
if os.fork() == 0:
    held = bytearray(os.urandom(40_000_000))
until = time.process_time() + 0.5
while time.process_time() < until:
    pass
os._exit(0)
"""


def test_the_whole_tree_of_processes_is_counted():
    usage = measure([sys.executable, "-c", TREE])
    assert 1.0 <= usage.cpu_s < 4
    assert 80e6 < usage.peak_bytes < 200e6


def test_a_command_that_fails_is_an_error_with_its_words():
    with pytest.raises(RuntimeError, match="exit code 3"):
        measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_rival_that_is_not_installed_is_named_with_its_package():
    needs = (("json", "json"), ("no_such_module.part", "some-package"))
    assert missing_modules(sys.executable, needs) == "not installed (pip install some-package)"
    assert missing_modules(sys.executable, needs[:1]) == ""
    with pytest.raises(UserError, match="there are a, b"):
        known_rivals(["c"], ["a", "b"])


@pytest.mark.slow
def test_tokenize_gives_the_same_tokens_as_the_library_from_every_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "VOCAB_SIZE", 300)
    texts = [f"Document {number} of {number * number}." * 3 for number in range(60)]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"source": [str(source)], "megabytes": sum(map(len, texts)) / 1e6, "rivals_python": sys.executable}
    trained = tokenize._train(tokenize.TextFiles({"jsonl": [str(source)]}, {}, 0, 0), tmp_path / "tokenizer")
    table = tokenize.bench_tokenize(rounds=1, tokenizer=trained, rivals=["tokenizers"], workers=1, **options)
    library = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokens = np.array([token for text in texts for token in [*library.encode(text).ids, 0]], np.uint16)
    digest, rows = hashlib.sha1(tokens.tobytes()).hexdigest()[:10], _rows(table)
    assert list(rows) == [*(pipeline.label for pipeline in tokenize.OURS.values()), "tokenizers encode_batch_fast"]
    assert {(row[-2], row[-1]) for row in rows.values()} == {(f"{len(tokens):,}", digest)}


@pytest.mark.slow
def test_data_reads_and_starts_beside_the_raw_gather():
    table = data.bench_data(
        rounds=1,
        tokens=40 * data.SEQ_LEN,
        seconds=0.1,
        rivals=["gather"],
        rivals_python=sys.executable,
        workers=[0],
        our_sizes=(10**8,),
        rivals_sizes=(),
    )
    reading, starting = re.split(r"\n\n(?=To the first batch)", table)
    assert [next(iter(row)) for row in _rows(reading).values()] == ["0", "0"]
    assert starting.count("| 1e+08 ") == 2
    assert starting.count("not run") == 1


def _rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows but the first, by the first."""
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}
