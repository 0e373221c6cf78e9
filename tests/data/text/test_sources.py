"""Sources: every format gives the same texts, a source can continue from any cursor, and bad files are named."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from pretrain.data.text import Source, compression, long_texts, open_source, readers
from pretrain.data.text.long_texts import cut_long
from pretrain.errors import UserError

TEXTS = ["one\r\n", "", "  two\n\nlines ", "drei größer 漢字 🎉", "\u2028 odd line ends \x85", "six"] * 50


def _json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def _table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"text": texts, "id": list(range(len(texts)))})


def _write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(_table(texts), path, row_group_size=70)


def _write_arrow_stream(path: Path, texts: list[str]) -> None:
    table = _table(texts)
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=70)


def _write_arrow_file(path: Path, texts: list[str]) -> None:
    table = _table(texts)
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=70)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".jsonl": lambda path, texts: path.write_bytes(_json_lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(_json_lines(texts))),
    ".jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(_json_lines(texts))),
    ".json.gz": lambda path, texts: path.write_bytes(gzip.compress(_json_lines(texts))),
    ".parquet": _write_parquet,
    "stream.arrow": _write_arrow_stream,
    "file.arrow": _write_arrow_file,
}


def _open(*paths: object, **options: object) -> Source:
    return open_source(
        [str(path) for path in paths], **{"text_field": "text", "subset": None, "split": "train"} | options
    )


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_texts(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"a{ending}", TEXTS)
    source = _open(tmp_path / f"a{ending}")
    assert list(source.texts()) == TEXTS
    assert source.read_bytes() == source.size_bytes == (tmp_path / f"a{ending}").stat().st_size


@pytest.mark.parametrize("giant_row_groups", [False, True])
@pytest.mark.parametrize("ending", WRITERS)
def test_another_source_goes_on_from_any_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, giant_row_groups: bool
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    if giant_row_groups:
        monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", 0)
        monkeypatch.setattr(readers, "_BATCH_ROWS", 16)
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS)]
    for name, part in (("a", texts[:200]), ("b", texts[200:])):
        WRITERS[ending](tmp_path / f"{name}{ending}", part)
    source = _open(tmp_path / f"*{ending}")
    taken, files = [], []
    for block in source.blocks():
        taken += block.texts()
        files += [block.file] * len(block.texts())
        cursor = json.loads(json.dumps(source.cursor()))
        other = _open(tmp_path / f"*{ending}")
        other.seek(cursor)
        assert [*taken, *other.texts()] == texts
        assert other.read_bytes() == other.size_bytes
    assert len(set(map(str, [block.place for block in _open(tmp_path / f"*{ending}").blocks()]))) > 4
    assert files == [0] * 200 + [1] * 100
    assert [Path(file["path"]).name for file in source.files] == [f"a{ending}", f"b{ending}"]


def test_text_files_are_a_text_each_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    (tmp_path / "notes.md").write_text("not asked for")
    assert list(_open(tmp_path).texts()) == ["a.txt\r\n", "b.txt\r\n", "sub/c.txt\r\n"]
    assert list(_open(tmp_path / "b.txt", tmp_path / "**/*.txt").texts()) == ["b.txt\r\n", "a.txt\r\n", "sub/c.txt\r\n"]


def test_a_long_text_file_is_cut_at_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "MAX_DOCUMENT_CHARACTERS", 100)
    content = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(content)
    texts = [piece for text in _open(tmp_path / "a.txt").texts() for piece in cut_long(text)]
    assert "".join(texts) == content
    assert all(len(text) <= 100 and text.endswith("\n") for text in texts)


def test_long_texts_are_cut_even_without_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "MAX_DOCUMENT_CHARACTERS", 10)
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


BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: it is not JSON"),
    ("a.jsonl", b"[1]\n", "line 1: it should be a JSON object and is a list"),
    ("a.jsonl", b'\n\n{"body": "x", "id": 1}\n', "line 3, has no field 'text'; its fields are body, id"),
    ("a.jsonl", b'{"text": 5}\n', "holds a int, not text"),
    ("a.jsonl", b'{"text": "\xff"}\n', "is not JSON"),
    ("a.jsonl", b"[" * 100_000, "is not JSON"),
    ("a.jsonl.gz", gzip.compress(_json_lines(TEXTS))[:-20], "ends within its compressed data, at byte "),
    ("a.jsonl.gz", b"", "at byte 0"),
    ("a.jsonl.zst", b"", "at byte 0"),
    ("a.jsonl.gz", b"\0" * 300, "incorrect header check"),
    ("a.jsonl.gz", b"not gzip", "incorrect header check, before byte 8"),
    ("a.jsonl.gz", gzip.compress(_json_lines(TEXTS)) + b"more", "incorrect header check"),
    ("a.jsonl.zst", zstandard.compress(_json_lines(TEXTS))[:-20], "ends within its compressed data, at byte "),
    ("a.jsonl.zst", b"not zstd", "frame descriptor, before byte 8"),
    ("a.parquet", b"not parquet", "ArrowInvalid"),
    ("a.arrow", b"not arrow at all", "ArrowInvalid"),
    ("a.txt", b"ol\xe9", "from byte 2: it is not UTF-8 (byte 0xe9: unexpected end of data)"),
    ("a.py", b"# coding: klingon\n", "SyntaxError"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        list(_open(tmp_path / name).texts())
    assert str(tmp_path / name) in str(caught.value)


def test_an_unreadable_row_group_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_parquet(tmp_path / "a.parquet", [f"{number} {text}" for number, text in enumerate(TEXTS)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(content)
    for largest in (1 << 25, 0):  # read whole, and in batches
        monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", largest)
        with pytest.raises(UserError, match=r"a\.parquet, row group 2"):
            list(_open(tmp_path / "a.parquet").texts())


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3 + '{"text": "' + "x" * (3 << 20))
    with pytest.raises(UserError, match=r"a\.jsonl, line 4, has more than 1 MiB"):
        list(_open(tmp_path / "a.jsonl").texts())


@pytest.mark.parametrize("padding", [b"", b"\0" * 300])
def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path, padding: bytes) -> None:
    members = [gzip.compress(_json_lines(TEXTS[n : n + 10])) for n in range(0, len(TEXTS), 10)]
    (tmp_path / "a.jsonl.gz").write_bytes(padding.join(members) + padding)
    assert list(_open(tmp_path / "a.jsonl.gz").texts()) == TEXTS


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_what_little_compressed_data_holds_is_not_in_memory_at_once(tmp_path: Path, ending: str, compress) -> None:
    content = b"\n" * (300 << 20)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(content))
    with open(path, "rb") as raw:
        sizes = [len(chunk) for chunk in compression.content(raw, path.name)]
    assert sum(sizes) == len(content)
    assert max(sizes) <= 128 << 20


def test_a_zstandard_file_with_a_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    content = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(content.compress(_json_lines(TEXTS)) + content.flush())
    assert list(_open(tmp_path / "a.jsonl.zst").texts()) == TEXTS


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


def test_progress_reaches_the_size_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.txt").write_text("y" * 500)
    source = _open(tmp_path)
    seen = [source.read_bytes() for _ in source.blocks()]
    assert seen == [1000, 1500]
    assert source.read_bytes() == source.size_bytes == 1500


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_parts_are_every_file_once_in_order_and_about_equal(tmp_path: Path, count: int) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"{number} " + "x" * (number * number % 91 * 10))
    whole = _open(tmp_path)
    parts = [_open(tmp_path, part=(number, count)) for number in range(count)]
    assert [text for part in parts for text in part.texts()] == list(whole.texts())
    assert [file for part in parts for file in part.files] == whole.files
    assert sum(part.size_bytes for part in parts) == whole.size_bytes
    largest = max(file["bytes"] for file in whole.files)
    assert max(part.size_bytes for part in parts) <= whole.size_bytes / count + largest
    assert all(part.description == whole.description for part in parts)


def test_parts_of_empty_files_are_still_every_file_once(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").touch()
    parts = [_open(tmp_path, part=(number, 2)) for number in range(2)]
    assert sum(len(part.files) for part in parts) == 3
