"""Files whose names are not UTF-8, or hold line ends and quotes: read, recorded and shown, or refused in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.schema import load_config
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.trainer.plan import make_plan
from tests.support.corpus import Corpus
from tests.support.runs import REPOSITORY

LATIN = os.fsdecode(b"caf\xe9")
NAMES = ["-dash.txt", f"{LATIN}.txt", "new\nline.txt", "quo\"te's.txt", "σ ü.txt"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names") / LATIN
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_text("the shard of a token\n" * (50 - number), encoding="utf-8")
    return folder


def tool(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / f"tools/{name}.py", *words]
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, encoding="utf-8", timeout=240)


def test_sources_and_shards_may_have_any_name(sources: Path, corpus: Corpus) -> None:
    """JSON holds a byte that is not UTF-8 as an escape, and returns it unchanged."""
    words = ["--source", LATIN, "--tokenizer", corpus.tokenizer, "--out", f"{LATIN}_shards", "--val-fraction", 0]
    made = tool("prepare_data", *words, cwd=sources.parent)
    assert made.returncode == 0, made.stderr
    assert "complete: caf\\udce9_shards" in made.stdout
    manifest = (sources.parent / f"{LATIN}_shards/train/manifest.json").read_bytes()
    recorded = [source["path"] for source in json.loads(manifest)["sources"]]
    assert recorded == [f"{LATIN}/{name}" for name in NAMES]
    assert all((sources.parent / path).is_file() for path in recorded)

    shown = tool("inspect_data", "--corpus", f"{LATIN}_shards/train", cwd=sources.parent)
    assert shown.returncode == 0, shown.stderr
    rows = [line.split(maxsplit=2)[2] for line in shown.stdout.splitlines() if "  caf\\udce9/" in line]
    assert rows == [f"caf\\udce9/{name}".replace(LATIN, "caf\\udce9").replace("\n", "\\n") for name in NAMES]


def test_where_libraries_write_a_name_that_is_no_utf_8_is_refused(
    sources: Path, corpus: Corpus, run_file: Path, tmp_path: Path
) -> None:
    trained = tool("train_tokenizer", "--source", LATIN, "--vocab-size", 300, "--out", LATIN + "_t", cwd=sources.parent)
    assert (trained.returncode, trained.stdout) == (2, "")
    assert trained.stderr.startswith("error: --out 'caf\\udce9_t' has a name that is not UTF-8")
    assert trained.stderr.count("\n") == 1
    assert not (sources.parent / f"{LATIN}_t").exists()

    link = tmp_path / LATIN
    link.symlink_to(corpus.tokenizer)
    with pytest.raises(UserError, match=r"the tokenizer '.*' has a name that is not UTF-8"):
        load_tokenizer(link)
    with pytest.raises(UserError, match=r"--out '.*' has a name that is not UTF-8"):
        convert(tmp_path / "checkpoint", tmp_path / f"{LATIN}_out")
    with pytest.raises(UserError, match=r"the run folder '.*' has a name that is not UTF-8"):
        make_plan(load_config(run_file, ['out="caf\\udce9"']), world_size=2)
    with pytest.raises(UserError, match=r"--set out=.*: the value is not UTF-8"):
        load_config(run_file, [f"out={LATIN}"])
