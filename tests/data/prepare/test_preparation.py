"""Preparation: every document once, in order, in the split its text decides, and the same bytes after any stop."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import TokenShards, fingerprint, open_shards
from pretrain.data.prepare import prepare
from pretrain.data.prepare.encoding import Encoder
from pretrain.data.text.sources import HubSource, Source, open_source
from pretrain.errors import UserError

OPTIONS = {"val_fraction": 0.2, "shard_tokens": 3000, "max_tokens": None, "workers": 1}


class Stopped(Exception):
    """Stands for a kill between two texts."""


@pytest.fixture(scope="module")
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


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.prepare.encoding.UNIT_CHARACTERS", 2000)


def _open(*spec: str) -> Source:
    return open_source(spec, text_field="text", subset=None, split="train")


def test_every_document_is_there_once_in_order_and_ended(
    corpus: str, texts: list[str], tokenizer, tmp_path: Path
) -> None:
    shards = prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
    found = {split: _documents(held, tokenizer) for split, held in shards.items()}
    wanted = [text.encode("utf-8", "replace").decode() for text in texts if text]
    remaining = {split: list(documents) for split, documents in found.items()}
    for text in wanted:  # each text is the next of one of the splits
        split = next(split for split in remaining if remaining[split] and remaining[split][0] == text)
        remaining[split].pop(0)
    assert remaining == {"train": [], "val": []}
    assert 15 < len(found["val"]) < 65  # 199 documents, a fifth expected
    assert shards["train"].text_bytes == sum(len(text.encode()) for text in found["train"])


def test_the_manifest_says_what_a_reader_needs(corpus: str, tokenizer, tmp_path: Path) -> None:
    shards = prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)["train"]
    assert shards.tokenizer_fingerprint == fingerprint(tokenizer)
    assert (shards.vocab_size, shards.eos_id, shards.dtype) == (1000, 2, np.uint16)
    assert shards.manifest["split"] == "train"
    assert shards.manifest["source"]["paths"] == [corpus]
    assert len(shards.shards) > 3
    assert not [shard for shard in shards.shards if shard.tokens < 3000][:-1]


def test_workers_do_not_change_the_bytes(corpus: str, tokenizer, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(_open(corpus), tokenizer, tmp_path / f"out{workers}", **OPTIONS | {"workers": workers})
    assert _contents(tmp_path / "out1") == _contents(tmp_path / "out3")


@pytest.mark.parametrize("commit_interval_s", [0.0, 1000.0])
def test_a_preparation_stopped_anywhere_ends_with_the_same_bytes(
    corpus: str, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_interval_s: float
) -> None:
    prepare(_open(corpus), tokenizer, tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr("pretrain.data.prepare.preparation.COMMIT_INTERVAL_S", commit_interval_s)
    for stop in range(0, 200, 23):
        with pytest.raises(Stopped):
            prepare(_stopping(_open(corpus), stop), tokenizer, tmp_path / f"out{stop}", **OPTIONS)
        with pytest.raises(UserError, match="run the same command again"):
            open_shards(tmp_path / f"out{stop}" / "train")
        prepare(_open(corpus), tokenizer, tmp_path / f"out{stop}", **OPTIONS)
        assert _contents(tmp_path / f"out{stop}") == _contents(tmp_path / "whole")


def test_a_stopped_preparation_does_not_begin_again(
    corpus: str, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.prepare.preparation.COMMIT_INTERVAL_S", 0.0)
    with pytest.raises(Stopped):
        prepare(_stopping(_open(corpus), 150), tokenizer, tmp_path / "out", **OPTIONS)
    encoded: list[str] = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
    assert 50 <= len(encoded) < 80  # the 50 that are left and at most one unit


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_streamed_data_set_gives_the_tokens_of_its_files(
    kind: str, texts: list[str], tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [text for text in texts if "\ud800" not in text]  # parquet holds no half surrogates
    (tmp_path / "json").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "parquet", row_group_size=30)

    def stream() -> Source:
        return HubSource(kind, text_field="text", subset=None, split="train", data_files=str(tmp_path / kind))

    (tmp_path / "same.jsonl").write_bytes((tmp_path / "json").read_bytes())
    of_files = prepare(_open(str(tmp_path / "same.jsonl")), tokenizer, tmp_path / "files", **OPTIONS)
    monkeypatch.setattr("pretrain.data.prepare.preparation.COMMIT_INTERVAL_S", 0.0)
    with pytest.raises(Stopped):
        prepare(_stopping(stream(), 120), tokenizer, tmp_path / "stream", **OPTIONS)
    of_stream = prepare(stream(), tokenizer, tmp_path / "stream", **OPTIONS)
    for split in ("train", "val"):
        assert of_stream[split].fingerprint == of_files[split].fingerprint


def test_adding_files_moves_no_document_to_the_other_split(corpus: str, tokenizer, tmp_path: Path) -> None:
    before = prepare(_open(corpus), tokenizer, tmp_path / "before", **OPTIONS)
    (tmp_path / "0 first.jsonl").write_text('{"text": "a new document"}\n')
    after = prepare(_open(corpus), tokenizer, tmp_path / "after", **OPTIONS)
    for split in ("train", "val"):
        assert set(_documents(before[split], tokenizer)) <= set(_documents(after[split], tokenizer))


def test_a_complete_preparation_is_left_alone(corpus: str, tokenizer, tmp_path: Path) -> None:
    prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.name != ".lock"}
    prepare(_stopping(_open(corpus), 0), tokenizer, tmp_path / "out", **OPTIONS)
    assert times == {file: file.stat().st_mtime_ns for file in times}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 4000}, "shard_tokens was 3000 and is now 4000"),
        ({"val_fraction": 0.1}, "val_fraction was 0.2 and is now 0.1"),
        ({"max_tokens": 10}, "max_tokens was None and is now 10"),
    ],
)
def test_another_command_on_the_same_folder_is_refused(
    corpus: str, tokenizer, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(Stopped):
        prepare(_stopping(_open(corpus), 150), tokenizer, tmp_path / "out", **OPTIONS)
    before = _contents(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS | change)
    assert _contents(tmp_path / "out") == before


def test_source_files_that_changed_meanwhile_are_refused(corpus: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        prepare(_stopping(_open(corpus), 150), tokenizer, tmp_path / "out", **OPTIONS)
    with open(tmp_path / "1.jsonl", "a") as file:
        file.write('\n{"text": "more"}\n')
    with pytest.raises(UserError, match="source bytes was"):
        prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)


def test_a_folder_with_other_files_is_refused_and_left_alone(corpus: str, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds files that no preparation recorded \(0\.jsonl"):
        prepare(_open(corpus), tokenizer, tmp_path, **OPTIONS)
    assert sorted(file.name for file in tmp_path.glob("[!.]*")) == [f"{number}.jsonl" for number in range(4)]


def test_a_path_that_cannot_be_a_folder_is_refused(corpus: str, tokenizer, tmp_path: Path) -> None:
    for out in (tmp_path / "0.jsonl", tmp_path / "0.jsonl" / "below"):
        with pytest.raises(UserError, match="cannot write to"):
            prepare(_open(corpus), tokenizer, out, **OPTIONS)


def test_a_full_disk_is_explained_and_survived(
    corpus: str, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(_open(corpus), tokenizer, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.data.prepare.preparation.COMMIT_INTERVAL_S", 0.0)
        patch.setattr("pretrain.data.tokens.shards.os.fsync", _full_after(5))
        with pytest.raises(UserError, match="No space left"):
            prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
    prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_two_preparations_cannot_share_a_folder(corpus: str, tokenizer, tmp_path: Path) -> None:
    class Meddling:
        def __init__(self, source: Source) -> None:
            self.description, self.size_bytes, self.source = source.description, source.size_bytes, source

        def texts(self) -> Iterator[str]:
            prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS)
            return self.source.texts()

    with pytest.raises(UserError, match="another preparation is writing"):
        prepare(Meddling(_open(corpus)), tokenizer, tmp_path / "out", **OPTIONS)


def test_max_tokens_ends_at_the_document_that_reaches_it(corpus: str, tokenizer, tmp_path: Path) -> None:
    everything = prepare(_open(corpus), tokenizer, tmp_path / "all", **OPTIONS)["train"]
    limit = everything.tokens // 2
    options = OPTIONS | {"max_tokens": limit}
    some = prepare(_open(corpus), tokenizer, tmp_path / "some", **options)["train"]
    assert np.array_equal(some.read(0, some.tokens), everything.read(0, some.tokens))
    assert some.tokens >= limit
    documents = _documents(some, tokenizer)
    assert some.tokens - len(tokenizer(documents[-1], split_special_tokens=True)["input_ids"]) - 1 < limit
    assert some.text_bytes == sum(len(text.encode()) for text in documents)
    again = prepare(_stopping(_open(corpus), 0), tokenizer, tmp_path / "some", **options)["train"]
    assert again.fingerprint == some.fingerprint


def test_without_validation_there_is_no_val_folder(corpus: str, tokenizer, tmp_path: Path) -> None:
    shards = prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS | {"val_fraction": 0.0})
    assert list(shards) == ["train"]
    assert shards["train"].documents == 199
    assert not (tmp_path / "out" / "val").exists()


def test_a_source_without_text_is_refused(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        prepare(_open(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "out", **OPTIONS)


def test_a_bad_line_is_named_and_the_workers_end(corpus: str, tokenizer, tmp_path: Path) -> None:
    with open(tmp_path / "3.jsonl", "a") as file:
        file.write("\nnot json\n")
    with pytest.raises(UserError, match=r"3\.jsonl, line 51, is not JSON"):
        prepare(_open(corpus), tokenizer, tmp_path / "out", **OPTIONS | {"workers": 2})
    assert not multiprocessing.active_children()


def _documents(shards: TokenShards, tokenizer) -> list[str]:
    """The texts in the shards, taken apart at the `.ends` files and decoded."""
    documents = []
    for shard in shards.shards:
        tokens = np.fromfile(shards.folder / shard.file, dtype=shards.dtype)
        ends = np.fromfile(shards.folder / shard.ends_file, dtype="<u8").astype(int)
        assert (tokens[ends - 1] == shards.eos_id).all()
        assert (tokens == shards.eos_id).sum() == len(ends)
        documents += [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends[:-1])]
    return documents


def _contents(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes() for split in ("train", "val") for file in (out / split).iterdir()
    }


def _stopping(source: Source, after: int) -> Source:
    """`source`, that raises instead of giving its text number `after`."""
    texts = source.texts

    def some() -> Iterator[str]:
        stream = texts()
        for _ in range(after):
            yield next(stream)
        raise Stopped

    source.texts = some
    return source


def _full_after(calls: int):
    left = [calls]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    return fsync
