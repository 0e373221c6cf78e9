"""Sources: every format gives the same texts, any cursor can be gone back to, and bad files are named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pretrain.data.text import sources
from pretrain.data.text.sources import FileSource, HubSource, Source, cut_long, open_source
from pretrain.errors import UserError

TEXTS = ["one\r\n", "", "  two\n\nlines ", "drei größer 漢字 🎉", "\u2028 odd line ends \x85", "six"] * 50


def _json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def _write_parquet(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=70)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".jsonl": lambda path, texts: path.write_bytes(_json_lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(_json_lines(texts))),
    ".jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(_json_lines(texts))),
    ".parquet": _write_parquet,
}


def _open(*paths: object, **options: str) -> Source:
    return open_source(
        [str(path) for path in paths], **{"text_field": "text", "subset": None, "split": "train"} | options
    )


def _hub(path: Path) -> HubSource:
    builder = "parquet" if path.suffix == ".parquet" else "json"
    return HubSource(builder, text_field="text", subset=None, split="train", data_files=str(path))


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_texts(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"a{ending}", TEXTS)
    source = _open(tmp_path / f"a{ending}")
    assert list(source.texts()) == TEXTS
    assert source.read_bytes() == source.size_bytes


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_streamed_data_set_gives_the_texts(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"a{ending}", TEXTS)
    assert list(_hub(tmp_path / f"a{ending}").texts()) == TEXTS


@pytest.mark.parametrize("open_one", [*WRITERS, "hub.jsonl", "hub.parquet"])
def test_another_source_goes_on_from_any_cursor(tmp_path: Path, open_one: str) -> None:
    ending = open_one.removeprefix("hub")
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS)]
    for name, part in (("a", texts[:200]), ("b", texts[200:])):
        WRITERS[ending](tmp_path / f"{name}{ending}", part)
    pattern = tmp_path / f"*{ending}"

    def reopen() -> Source:
        return _hub(pattern) if open_one.startswith("hub") else _open(pattern)

    for taken in (1, 69, 70, 71, 199, 200, 201, 299, 300):
        source = reopen()
        stream = source.texts()
        before = [next(stream) for _ in range(taken)]
        cursor = json.loads(json.dumps(source.cursor()))
        source = reopen()
        source.seek(cursor)
        assert [*before, *source.texts()] == texts


def test_text_files_are_a_text_each_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    (tmp_path / "notes.md").write_text("not asked for")
    assert list(_open(tmp_path).texts()) == ["a.txt\r\n", "b.txt\r\n", "sub/c.txt\r\n"]
    assert list(_open(tmp_path / "b.txt", tmp_path / "**/*.txt").texts()) == ["b.txt\r\n", "a.txt\r\n", "sub/c.txt\r\n"]


def test_a_long_text_file_is_cut_at_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARACTERS", 100)
    content = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(content)
    texts = [piece for text in _open(tmp_path / "a.txt").texts() for piece in cut_long(text)]
    assert "".join(texts) == content
    assert all(len(text) <= 100 and text.endswith("\n") for text in texts)


def test_long_texts_are_cut_even_without_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARACTERS", 10)
    assert cut_long("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]
    assert cut_long("") == [""]
    assert cut_long("x" * 10) == ["x" * 10]


def test_the_standard_library_is_code_and_help_in_a_fixed_order() -> None:
    source = _open("stdlib")
    texts = list(source.texts())
    assert texts == list(_open("stdlib").texts())
    assert len(texts) > 300
    assert any("class JSONDecoder" in text for text in texts)
    assert not any("class TestCase0" in text for text in texts)
    assert texts[-1].startswith('The "yield" statement')


def test_descriptions_tell_sources_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = _open(tmp_path / "*.txt").description
    assert _open(tmp_path / "*.txt").description == first
    (tmp_path / "b.txt").write_text("two")
    assert _open(tmp_path / "*.txt").description["listing"] != first["listing"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2, is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1, should be a JSON object and is a list"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "has no field 'text'; its fields are body, id"),
        ("a.jsonl", b'{"text": 5}\n', "holds a int, not text"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is not JSON"),
        ("a.jsonl.gz", gzip.compress(_json_lines(TEXTS))[:-20], "EOFError"),
        ("a.jsonl.gz", b"not gzip", "BadGzipFile"),
        ("a.jsonl.zst", zstandard.compress(_json_lines(TEXTS))[:-20], "EOFError"),
        ("a.jsonl.zst", b"not zstd", "ZstdError"),
        ("a.parquet", b"not parquet", "ArrowInvalid"),
        ("a.txt", b"ol\xe9", "UnicodeDecodeError"),
        ("a.py", b"# coding: klingon\n", "SyntaxError"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(_open(tmp_path / name).texts())
    assert str(tmp_path / name) in str(caught.value)


def test_a_zstandard_file_of_several_frames_is_read_whole_and_a_cut_one_noticed(tmp_path: Path) -> None:
    first = zstandard.compress(_json_lines(TEXTS))
    whole = first + zstandard.compress(_json_lines(["last"]))
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert list(_open(tmp_path / "a.jsonl.zst").texts()) == [*TEXTS, "last"]
    for cut in set(range(1, len(whole))) - {len(first)}:
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.jsonl\.zst"):
            list(_open(tmp_path / "a.jsonl.zst").texts())


def test_parquet_without_the_field_names_its_fields(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError, match="no field 'body'; its fields are text, id"):
        list(_open(tmp_path / "a.parquet", text_field="body").texts())


def test_names_that_match_nothing_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"nothing\*' matches no file"):
        _open(tmp_path / "nothing*")
    with pytest.raises(UserError, match=r"a\.csv is of no kind"):
        _open(tmp_path / "*.csv")
    with pytest.raises(UserError, match="goes with a source hf://"):
        _open(tmp_path / "a.csv", subset="x")


def test_a_null_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "x"}\n')
    assert list(_open(tmp_path / "a.jsonl").texts()) == ["", "x"]


def test_a_data_set_without_the_field_names_its_fields(tmp_path: Path) -> None:
    WRITERS[".jsonl"](tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match="no field 'body'; its fields are id, text"):
        HubSource("json", text_field="body", subset=None, split="train", data_files=str(tmp_path / "a.jsonl"))


def test_an_unreachable_data_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot stream hf://nobody/nothing"):
        _open("hf://nobody/nothing")


def test_progress_reaches_the_size_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.txt").write_text("y" * 500)
    source = FileSource([tmp_path / "a.txt", tmp_path / "b.txt"], {"kind": "files"}, "text")
    seen = [source.read_bytes() for _ in source.texts()]
    assert seen == [1000, 1500]
    assert source.read_bytes() == source.size_bytes == 1500
