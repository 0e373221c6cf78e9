"""Preparation: every document once, in order, in the split its text decides, and the same bytes after any stop."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import fingerprint, open_shards
from pretrain.data.prepare import journal, merge, preparation, prepare
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import TokenizerInfo
from pretrain.errors import UserError
from tests.support.prepared import (
    OPTIONS,
    Stopped,
    contents,
    documents_of,
    manifest_of,
    prepare_files,
    stop_after,
    texts_of,
)

SPLITS = ("train", "val", "held_out")
pytestmark = pytest.mark.usefixtures("small_units")


def test_every_document_is_there_once_in_order_and_ended(
    corpus: str, texts: list[str], tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path
) -> None:
    shards = prepare_files(corpus, tokenizer_info, tmp_path / "out")
    found = {split: texts_of(tmp_path / "out" / split, tokenizer) for split in SPLITS}
    remaining = {split: list(documents) for split, documents in found.items()}
    for text in (text.encode("utf-8", "replace").decode() for text in texts if text):  # the next one of some split
        split = next(split for split in SPLITS if remaining[split] and remaining[split][0] == text)
        remaining[split].pop(0)
    assert not any(remaining.values())
    assert 15 < len(found["val"]) < 65  # 199 documents, a fifth expected
    assert 5 < len(found["held_out"]) < 40  # and a tenth
    for split in SPLITS:
        assert shards[split].text_bytes == sum(len(text.encode()) for text in found[split])


def test_the_manifest_says_what_a_reader_needs(
    corpus: str, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path
) -> None:
    shards = prepare_files(corpus, tokenizer_info, tmp_path / "out")["train"]
    manifest = manifest_of(tmp_path / "out/train")
    assert shards.tokenizer_fingerprint == fingerprint(tokenizer)
    assert (shards.vocab_size, shards.eos_id, shards.dtype) == (1000, 2, np.uint16)
    assert (manifest["split"], manifest["shuffle"], manifest["source"]["paths"]) == ("train", None, [corpus])
    assert len(shards.shards) > 3
    assert not [shard for shard in shards.shards if shard.tokens < 3000][:-1]


def test_the_manifest_counts_what_each_file_gave(
    corpus: str, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "out")
    for split in SPLITS:
        of_split = set(texts_of(tmp_path / "out" / split, tokenizer))
        sources = manifest_of(tmp_path / "out" / split)["sources"]
        assert [source["path"] for source in sources] == [str(tmp_path / f"{number}.jsonl") for number in range(4)]
        for source in sources:
            file = Path(source["path"])
            of_file = [
                json.loads(line)["text"].encode("utf-8", "replace").decode() for line in file.open(encoding="utf-8")
            ]
            given = [text for text in of_file if text in of_split]
            assert source["documents"] == len(given) > 0
            ids = tokenizer(given, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert source["tokens"] == sum(map(len, ids)) + len(given)
            assert source["bytes"] == [0, file.stat().st_size]


def test_workers_do_not_change_the_bytes(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare_files(corpus, tokenizer_info, tmp_path / f"out{workers}", workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


@pytest.mark.parametrize("commit_interval_s", [0.0, 1000.0])
def test_a_preparation_stopped_anywhere_ends_with_the_same_bytes(
    corpus: str,
    tokenizer_info: TokenizerInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commit_interval_s: float,
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    monkeypatch.setattr("pretrain.data.prepare.journal.COMMIT_INTERVAL_S", commit_interval_s)
    for stop in (0, 5, 14):
        out = tmp_path / f"out{stop}"
        for units in (stop, 3):  # twice
            stop_after(monkeypatch, units)
            with pytest.raises(Stopped):
                prepare_files(corpus, tokenizer_info, out)
        with pytest.raises(UserError, match="run the same command again"):
            open_shards(out / "train")
        prepare_files(corpus, tokenizer_info, out)
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("eager")
def test_a_stopped_preparation_does_not_begin_again(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units: list[int] = []
    encode_in_order = preparation.encode_in_order

    def counted(*arguments: object):
        units.append(0)
        for unit in encode_in_order(*arguments):
            units[-1] += 1
            yield unit

    monkeypatch.setattr(preparation, "encode_in_order", counted)
    prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    stop_after(monkeypatch, 12)
    with pytest.raises(Stopped):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")
    prepare_files(corpus, tokenizer_info, tmp_path / "out")
    assert units[0] > 12
    assert units == [units[0], 12, units[0] - 12]


@pytest.mark.usefixtures("eager")
def test_bos_stands_before_every_document_after_a_stop_and_in_parts_too(
    corpus: str, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_info = replace(tokenizer_info, first_ids=(1,))
    whole = prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    stop_after(monkeypatch, 12)
    with pytest.raises(Stopped):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")
    prepare_files(corpus, tokenizer_info, tmp_path / "out", workers=2)
    for number in range(2):
        prepare_files(corpus, tokenizer_info, tmp_path / "parts", part=(number, 2))
    merge(tmp_path / "parts", workers=1)
    bare = prepare_files(corpus, tokenizer_info, tmp_path / "bare", add_bos="never")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for split in SPLITS:
        documents = documents_of(tmp_path / "whole" / split)
        assert [np.frombuffer(document, "<u2")[0] for document in documents] == [1] * len(documents)
        assert [document[2:] for document in documents] == documents_of(tmp_path / "bare" / split)
        assert documents_of(tmp_path / "parts" / split) == documents
        named = [manifest_of(tmp_path / folder / split)["bos_id"] for folder in ("whole", "parts", "bare")]
        assert named == [1, 1, None]
        assert whole[split].text_bytes == bare[split].text_bytes
    assert len({shards.fingerprint for shards in (whole["train"], bare["train"])}) == 2
    with pytest.raises(UserError, match="bos_id was 1 and is now None"):
        prepare_files(corpus, tokenizer_info, tmp_path / "whole", add_bos="never")


@pytest.mark.usefixtures("eager")
def test_the_journal_does_not_grow_with_the_files(tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "many").mkdir()
    for number in range(300):
        (tmp_path / "many" / f"{number:03d}.txt").write_text(f"document {number}")
    sizes: list[int] = []
    write_json = journal.write_json
    monkeypatch.setattr(
        journal, "write_json", lambda path, value: write_json(path, value) or sizes.append(path.stat().st_size)
    )
    prepare_files(str(tmp_path / "many"), tokenizer_info, tmp_path / "out", shard_tokens=10**6)
    assert len(sizes) > 1
    assert max(sizes) < 4000
    for split in SPLITS:
        manifest = manifest_of(tmp_path / "out" / split)
        assert len(manifest["sources"]) == manifest["documents"] > 0


@pytest.mark.usefixtures("eager")
def test_a_data_set_of_the_hub_gives_the_tokens_of_its_files(
    texts: list[str], tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [text for text in texts if "\ud800" not in text]  # parquet holds no half surrogates
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "set/train.parquet", row_group_size=30)
    of_files = prepare_files(str(tmp_path / "same.jsonl"), tokenizer_info, tmp_path / "files")
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        prepare_files(f"hf://{tmp_path}/set", tokenizer_info, tmp_path / "stream")
    of_stream = prepare_files(f"hf://{tmp_path}/set", tokenizer_info, tmp_path / "stream")
    for split in SPLITS:
        assert of_stream[split].fingerprint == of_files[split].fingerprint


def test_adding_files_moves_no_document_to_another_split(
    corpus: str, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "before")
    (tmp_path / "0 first.jsonl").write_text('{"text": "a new document"}\n')
    prepare_files(corpus, tokenizer_info, tmp_path / "after")
    for split in SPLITS:
        before, after = (set(texts_of(tmp_path / out / split, tokenizer)) for out in ("before", "after"))
        assert before <= after


def test_a_complete_preparation_is_left_alone(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*") if file.name != ".lock"}
    stop_after(monkeypatch, 0)
    prepare_files(corpus, tokenizer_info, tmp_path / "out")
    assert times == {file: file.stat().st_mtime_ns for file in times}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 4000}, "shard_tokens was 3000 and is now 4000"),
        ({"val_fraction": 0.1}, "val_fraction was 0.2 and is now 0.1"),
        ({"held_out_fraction": 0.0}, "held_out_fraction was 0.1 and is now 0.0"),
        ({"max_tokens": 10}, "max_tokens was None and is now 10"),
        ({"shuffle_seed": 3}, "shuffle was None and is now 3"),
    ],
)
def test_another_command_on_the_same_folder_is_refused(
    corpus: str,
    tokenizer_info: TokenizerInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    message: str,
) -> None:
    stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_source_files_that_changed_meanwhile_are_refused(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 5)
    with pytest.raises(Stopped):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")
    with open(tmp_path / "1.jsonl", "a", encoding="utf-8") as file:
        file.write('\n{"text": "more"}\n')
    with pytest.raises(UserError, match=r"source bytes was .*; the source files have changed"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")


def test_a_folder_with_other_files_is_refused_and_left_alone(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds files that no preparation recorded \(0\.jsonl"):
        prepare_files(corpus, tokenizer_info, tmp_path)
    assert sorted(file.name for file in tmp_path.glob("[!.]*")) == [f"{number}.jsonl" for number in range(4)]


def test_a_path_that_cannot_be_a_folder_is_refused(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    for out in (tmp_path / "0.jsonl", tmp_path / "0.jsonl" / "below"):
        with pytest.raises(UserError, match="cannot write to"):
            prepare_files(corpus, tokenizer_info, out)


@pytest.mark.usefixtures("eager")
def test_a_full_disk_is_explained_and_survived(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _full_after(30))
        with pytest.raises(UserError, match="No space left"):
            prepare_files(corpus, tokenizer_info, tmp_path / "out")
    prepare_files(corpus, tokenizer_info, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_preparations_cannot_share_a_folder(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preparation, "encode_in_order", lambda *arguments: prepare_files(corpus, tokenizer_info, tmp_path / "out")
    )
    with pytest.raises(UserError, match="another preparation is writing"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out")


def test_max_tokens_ends_at_the_document_that_reaches_it(
    corpus: str, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = prepare_files(corpus, tokenizer_info, tmp_path / "all")["train"].tokens // 2
    some = prepare_files(corpus, tokenizer_info, tmp_path / "some", max_tokens=limit)["train"]
    texts = texts_of(tmp_path / "some/train", tokenizer)
    assert texts == texts_of(tmp_path / "all/train", tokenizer)[: len(texts)]
    last = len(tokenizer(texts[-1], split_special_tokens=True)["input_ids"]) + 1
    assert some.tokens - last < limit <= some.tokens
    assert some.text_bytes == sum(len(text.encode()) for text in texts)
    manifest = manifest_of(tmp_path / "some/train")
    assert sum(source["tokens"] for source in manifest["sources"]) == some.tokens
    stop_after(monkeypatch, 0)
    again = prepare_files(corpus, tokenizer_info, tmp_path / "some", max_tokens=limit)["train"]
    assert again.fingerprint == some.fingerprint


def test_a_split_of_no_share_has_no_folder(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    shards = prepare_files(corpus, tokenizer_info, tmp_path / "out", val_fraction=0.0, held_out_fraction=0.0)
    assert list(shards) == ["train"]
    assert shards["train"].documents == 199
    assert [entry.name for entry in (tmp_path / "out").iterdir() if entry.is_dir()] == ["train"]


def test_a_source_without_text_is_refused(tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(
        UserError,
        match=r"the source '.*a\.jsonl' holds no text \(of 1 records: 1 empty\), so there is nothing to write\.$",
    ):
        prepare_files(str(tmp_path / "a.jsonl"), tokenizer_info, tmp_path / "out")


def test_when_no_record_passes_the_filters_they_are_named(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    source = open_source([corpus], text_field="text", subset=None, split="train", filters=["text=nothing"])
    with pytest.raises(UserError, match=r"holds no text \(of 200 records: 200 left out by --filter text=nothing\), so"):
        prepare(source, tokenizer_info, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("seed", [None, 4])
def test_when_no_document_is_left_to_train_on_the_folder_stays_free(
    tokenizer_info: TokenizerInfo, tmp_path: Path, seed: int | None
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    arguments = (str(tmp_path / "a.jsonl"), tokenizer_info, tmp_path / "out")
    with pytest.raises(UserError, match=r"all 3 documents of the source .* fell into val, so none is left"):
        prepare_files(*arguments, val_fraction=0.999999, held_out_fraction=0.0, shard_tokens=1, shuffle_seed=seed)
    assert not list((tmp_path / "out").glob("[!.]*"))
    shards = prepare_files(*arguments, val_fraction=0.0, held_out_fraction=0.0, shuffle_seed=seed)
    assert shards["train"].documents == 3


def test_a_hidden_folder_of_someone_else_is_refused_and_left_alone(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    (tmp_path / "out/.unshuffled").mkdir(parents=True)
    (tmp_path / "out/.unshuffled/note").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no preparation recorded \(\.unshuffled"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", shuffle_seed=1)
    assert (tmp_path / "out/.unshuffled/note").read_text() == "mine"


def test_a_bad_line_is_named_and_the_workers_end(corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    with open(tmp_path / "3.jsonl", "a", encoding="utf-8") as file:
        file.write("\nnot json\n")
    with pytest.raises(UserError, match=r"3\.jsonl, line 51: it is not JSON.* go on .*: --skip-unreadable\.$"):
        prepare_files(corpus, tokenizer_info, tmp_path / "out", workers=2)
    assert not multiprocessing.active_children()


def _full_after(calls: int):
    left = [calls]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    return fsync
