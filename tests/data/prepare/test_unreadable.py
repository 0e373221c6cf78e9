"""--skip-unreadable: damage, and only damage, is left out and named; the bytes do not depend on when it was allowed."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.prepare import merge, workers
from pretrain.data.text import readers
from pretrain.data.tokenizer import TokenizerInfo
from pretrain.errors import UserError
from tests.support.prepared import Stopped, contents, manifest_of, prepare_files, stop_after, texts_of

SPLITS = ("train", "val", "held_out")
pytestmark = pytest.mark.usefixtures("small_units", "eager")


@pytest.fixture
def damaged(tmp_path: Path, texts: list[str]) -> tuple[str, list[str], set[str]]:
    """A source of three damaged files among whole ones, the places of the damage, and the texts that can be read."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [f"{number} {text}" for number, text in enumerate(texts) if text and "\ud800" not in text]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join([*lines[:20], '{"text": "cut', *lines[20:40]]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[40:80]}), folder / "b.parquet", row_group_size=10)
    _break_row_group(folder / "b.parquet", 2)
    cut = gzip.compress("\n".join(lines[80:150]).encode(), 0)
    (folder / "c.jsonl.gz").write_bytes(cut[: len(cut) // 2])
    before_the_cut = zlib.decompressobj(31).decompress(cut[: len(cut) // 2]).count(b"\n")
    assert 20 < before_the_cut < 70
    (folder / "d.jsonl").write_text("\n".join(lines[150:]))
    whole = {*texts[:40], *texts[40:60], *texts[70:80], *texts[80 : 80 + before_the_cut], *texts[150:]}
    places = ["a.jsonl, line 21", "b.parquet, row group 2", f"c.jsonl.gz, from line {before_the_cut + 1}"]
    return str(folder), [f"{folder}/{place}" for place in places], whole


def _break_row_group(path: Path, group: int) -> None:
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)


@pytest.mark.parametrize("largest", [1 << 25, 0])  # row groups read by the workers, and by the reader in batches
def test_what_is_damaged_is_left_out_and_named(
    damaged, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path, monkeypatch, capfd, largest: int
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", largest)
    spec, places, whole = damaged
    prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True)
    found = {text for split in SPLITS for text in texts_of(tmp_path / "out" / split, tokenizer)}
    assert found == whole
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(printed) == 3
    for place, line in zip(places, printed, strict=True):
        assert line.startswith(f"left out: cannot read {place}: ")
    for split in SPLITS:
        assert manifest_of(tmp_path / "out" / split)["unreadable"] == places


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_a_preparation_that_stopped_at_damage_goes_on_with_the_same_bytes(
    damaged, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch, count: int, shuffle_seed: int | None
) -> None:
    monkeypatch.setattr(workers, "ALONE_CPU_S", 0.0)
    spec, places, _ = damaged
    prepare_files(spec, tokenizer_info, tmp_path / "whole", skip_unreadable=True, shuffle_seed=shuffle_seed)
    arguments = {"workers": count, "shuffle_seed": shuffle_seed}
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl, line 21: .*: --skip-unreadable\.$"):
            prepare_files(spec, tokenizer_info, tmp_path / "out", **arguments)
    for units in (6, 6):  # killed after some of the places
        stop_after(monkeypatch, units)
        with pytest.raises(Stopped):
            prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True, **arguments)
    prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True, **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(manifest_of(tmp_path / "out/train")["unreadable"]) == len(places)


def test_parts_joined_name_the_damage_of_all(damaged, tokenizer_info: TokenizerInfo, tmp_path: Path) -> None:
    spec, _, _ = damaged
    prepare_files(spec, tokenizer_info, tmp_path / "whole", skip_unreadable=True)
    for number in range(3):
        prepare_files(spec, tokenizer_info, tmp_path / "out", part=(number, 3), skip_unreadable=True)
    merge(tmp_path / "out", workers=1)
    for split in SPLITS:
        unreadable = [manifest_of(tmp_path / out / split)["unreadable"] for out in ("whole", "out")]
        assert unreadable[0] == unreadable[1] != []


def test_files_that_may_not_be_read_still_stop(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch
) -> None:
    real = open

    def forbidden(path: object, *arguments: object, **options: object):
        if str(path).endswith("2.jsonl"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UserError, match=r"2\.jsonl: PermissionError.*\. Mend or leave out the file\.$"):
        prepare_files(corpus, tokenizer_info, tmp_path / "other", skip_unreadable=True)


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[str, list[str]]:
    """A source of four files in which 20 + 2 records of 3,000 have no text, and the texts of the others."""
    folder = tmp_path / "uneven"
    folder.mkdir()
    texts = [f"document {number} " + "x" * (number % 5) for number in range(3000)]
    records = [{"text": text} for text in texts]
    bad = [*range(1000, 1020), 5, 2999]
    for number, record in zip(bad, ({"body": "x"}, {"text": None}, {"text": 5}, {"text": ["x"]}) * 6, strict=False):
        records[number] = record
    for part in range(4):
        lines = [json.dumps(record) for record in records[part * 750 : part * 750 + 750]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder), [text for number, text in enumerate(texts) if number not in bad]


def test_records_without_text_are_left_out_listed_and_counted_whatever_stops_and_shares_the_work(
    uneven, tokenizer_info: TokenizerInfo, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(workers, "ALONE_CPU_S", 0.0)
    spec, good = uneven
    prepare_files(spec, tokenizer_info, tmp_path / "whole", skip_unreadable=True)
    assert sorted(text for split in SPLITS for text in texts_of(tmp_path / "whole" / split, tokenizer)) == sorted(good)
    manifest = manifest_of(tmp_path / "whole/train")
    lines = [place.removeprefix(f"{spec}/") for place in manifest["unreadable"]]
    assert lines == ["0.jsonl, line 6", *(f"1.jsonl, line {number}" for number in range(251, 271)), "3.jsonl, line 750"]
    left_out = {"records": 3000, "empty": 0, "filtered": 0, "bad": 22, "files_without_text": 0}
    assert manifest["left_out"] == left_out

    with pytest.raises(UserError, match=r"0\.jsonl, line 6, has no field 'text'.*, although the 5 records before"):
        prepare_files(spec, tokenizer_info, tmp_path / "out")
    stop_after(monkeypatch, 30)
    with pytest.raises(Stopped):
        prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True)
    prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True, workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    for number in range(3):
        prepare_files(
            spec, tokenizer_info, tmp_path / "parts", part=(number, 3), skip_unreadable=True, max_bad_share=0.02
        )
    merge(tmp_path / "parts", workers=1)
    joined = manifest_of(tmp_path / "parts/train")
    assert (joined["unreadable"], joined["left_out"]) == (manifest["unreadable"], left_out)


def test_too_many_records_without_text_end_it_and_more_can_be_allowed(
    uneven, tokenizer_info: TokenizerInfo, tmp_path: Path, capfd
) -> None:
    spec, good = uneven
    with open(f"{spec}/3.jsonl", "a", encoding="utf-8") as file:
        file.write('{"body": "x"}\n' * 100)
    with pytest.raises(
        UserError, match=r"122 of the 3,100 records read so far give no text \(3\.9%; the first: .*0\.jsonl"
    ):
        prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True)
    assert "3.jsonl, 90 more records: has no field 'text'" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"\(.*; the first: .*0\.jsonl.*--max-bad-records 0 allows a share of 0"):
        prepare_files(spec, tokenizer_info, tmp_path / "none", skip_unreadable=True, max_bad_share=0.0)
    shards = prepare_files(spec, tokenizer_info, tmp_path / "out", skip_unreadable=True, max_bad_share=0.04)
    assert sum(held.documents for held in shards.values()) == len(good)
    unreadable = manifest_of(tmp_path / "out/train")["unreadable"]
    assert len(unreadable) == 1 + 20 + 1 + 10 + 1
    assert unreadable[-1] == f"{spec}/3.jsonl, 90 more records: has no field 'text'"


def test_a_null_is_left_out_without_being_asked_and_counted(
    tokenizer_info: TokenizerInfo, tmp_path: Path, capfd
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": ""}\n')
    options = {"val_fraction": 0.0, "held_out_fraction": 0.0}
    for name, skip_unreadable in (("one", False), ("other", True)):
        prepare_files(
            str(tmp_path / "a.jsonl"), tokenizer_info, tmp_path / name, skip_unreadable=skip_unreadable, **options
        )
        assert f"left out: {tmp_path}/a.jsonl, line 2, field 'text' is null" in capfd.readouterr().err
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    left_out = manifest_of(tmp_path / "one/train")["left_out"]
    assert left_out == {"records": 3, "empty": 1, "filtered": 0, "bad": 1, "files_without_text": 0}
