"""Filters: they keep the records that the same condition in plain Python keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.text import open_source, readers
from pretrain.errors import UserError

RECORDS = [
    {"text": f"text {number}", "language": language, "score": score, "count": count, "good": good}
    for number, (language, score, count, good) in enumerate(
        (language, score, count, good)
        for language in ("en", "de", None, "10")
        for score in (0.65, 0.5, None, 9.0, 10.0)
        for count in (9, 10, 2**53 + 1)
        for good in (True, False)
    )
]

CONDITIONS: list[tuple[list[str], Callable[[dict], bool]]] = [
    (["language=en"], lambda row: row["language"] == "en"),
    (["language != en"], lambda row: row["language"] not in ("en", None)),
    (["language<e"], lambda row: row["language"] in ("de", "10")),
    (["score>=0.65"], lambda row: row["score"] is not None and row["score"] >= 0.65),
    (["score<10"], lambda row: row["score"] is not None and row["score"] < 10),
    (["count>9"], lambda row: row["count"] > 9),
    (["count=9007199254740993"], lambda row: row["count"] == 2**53 + 1),
    (["count!=1e1"], lambda row: row["count"] != 10),
    (["good=true"], lambda row: row["good"]),
    (
        ["language=en", "score>0.6", "count<=10"],
        lambda row: row["language"] == "en" and (row["score"] or 0) > 0.6 and row["count"] <= 10,
    ),
    (["text=text 7"], lambda row: row["text"] == "text 7"),
]


@pytest.fixture(params=[".jsonl", ".parquet", "giant.parquet", ".arrow"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / f"a{request.param}"
    table = pyarrow.Table.from_pylist(RECORDS)
    if request.param == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    elif request.param == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    if request.param == "giant.parquet":
        monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", 0)
    return path


def _texts(file: Path, *filters: str) -> list[str]:
    source = open_source([str(file)], text_field="text", subset=None, split="train", filters=filters)
    return [text for text in source.texts() if text]


@pytest.mark.parametrize(("filters", "holds"), CONDITIONS, ids=[", ".join(filters) for filters, _ in CONDITIONS])
def test_a_filter_lets_through_what_the_condition_says(
    file: Path, filters: list[str], holds: Callable[[dict], bool]
) -> None:
    expected = [row["text"] for row in RECORDS if holds(row)]
    assert 0 < len(expected) < len(RECORDS)
    assert _texts(file, *filters) == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("tongue=en", "no field 'tongue'; its fields are text, language, score, count, good. Set --filter"),
        ("score>=high", "field 'score' holds numbers, and --filter 'score>=high' compares it with none"),
    ],
)
def test_a_filter_that_cannot_be_judged_is_explained(file: Path, written: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _texts(file, written)
    assert str(file) in str(caught.value)


def test_a_filter_on_a_list_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "tags": ["a"]}\n')
    with pytest.raises(UserError, match=r"line 1, field 'tags' holds a list, which --filter 'tags=a' cannot compare"):
        _texts(tmp_path / "a.jsonl", "tags=a")


@pytest.mark.parametrize(
    "written", ["language", "=en", "language~en", "", "language==en", "score>==1", "language= =en"]
)
def test_what_is_no_condition_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="is no condition: write a field"):
        _texts(tmp_path / "a.jsonl", written)


def test_filters_are_part_of_the_description(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')

    def description(*filters: str) -> dict:
        return open_source([str(tmp_path)], text_field="text", subset=None, split="train", filters=filters).description

    assert description("a=1") == description(" a = 1 ") != description()
    assert description("a=1") != description("a=2")


@pytest.mark.parametrize("file", ["giant.parquet", ".arrow"], indirect=True)
def test_only_the_columns_looked_at_are_read_of_tables(file: Path) -> None:
    for block in open_source([str(file)], text_field="text", subset=None, split="train", filters=["score>0"]).blocks():
        assert pyarrow.ipc.open_stream(block.content).schema.names == ["text", "score"]


@pytest.mark.parametrize("name", ["a.txt", "a.py"])
def test_plain_text_has_no_fields_to_filter_by(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    names = [str(tmp_path / name), str(tmp_path)]
    with pytest.raises(UserError, match=rf"'language=en' asks for a field, and .*{name} is plain text"):
        open_source(names, text_field="text", subset=None, split="train", filters=["language=en"])
