"""Every kind of file that can be read gives its texts, and an error names the place of a fault."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from pretrain.data.text import Source, long_texts, open_source, readers
from pretrain.data.text.kinds import kind_of
from pretrain.errors import UserError

TEXTS = ["one\r\n", "  two\n\nlines ", "drei größer 漢字 🎉", "nul \0 and \u2028", "six"] * 40
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
LINES = "".join(json.dumps({"text": text}) + "\r\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text, "n": [1, {"x": "]"}]} for text in TEXTS], indent=1).encode()


def _open(*paths: object, text_field: str = "text", **options: object) -> Source:
    return open_source([str(path) for path in paths], text_field=text_field, subset=None, split="train", **options)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("content", [LINES, b"\xef\xbb\xbf" + LINES, ARRAY, b"\xef\xbb\xbf \n" + ARRAY])
def test_json_in_lines_and_arrays_gives_the_texts_from_any_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, content: bytes
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)
    monkeypatch.setattr("pretrain.data.text.compression.CHUNK_BYTES", 97)
    path = tmp_path / f"A.JSON{compression.upper()}"
    path.write_bytes(COMPRESS[compression](content))
    source = _open(path)
    taken = []
    for block in source.blocks():
        taken += block.texts()
        other = _open(path)
        other.seek(source.cursor())
        assert [*taken, *other.texts()] == TEXTS
    assert taken == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_gives_its_text_without_a_byte_order_mark(tmp_path: Path, monkeypatch, compression: str) -> None:
    text = "".join(TEXTS)
    path = tmp_path / f"a.Txt{compression}"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(COMPRESS[compression](mark + text.encode()))
        for chunk_bytes in (1, 2, 3, 1 << 18):  # characters that are cut between chunks
            monkeypatch.setattr("pretrain.data.text.compression.CHUNK_BYTES", chunk_bytes)
            assert list(_open(path).texts()) == [text]


def test_two_members_and_what_follows_them(tmp_path: Path) -> None:
    for ending, compress in {".bz2": bz2.compress, ".xz": lzma.compress}.items():
        whole = compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}\n')
        (tmp_path / f"a.jsonl{ending}").write_bytes(whole)
        assert list(_open(tmp_path / f"a.jsonl{ending}").texts()) == ["a", "b"]
        for damaged, message in (
            (whole + b"more and more", r"from line \d: ValueError: "),
            (whole[:-9], "EOFError: the file ends"),
        ):
            (tmp_path / f"a.jsonl{ending}").write_bytes(damaged)
            with pytest.raises(UserError, match=message):
                list(_open(tmp_path / f"a.jsonl{ending}").texts())


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_what_little_compressed_data_holds_comes_in_small_pieces(tmp_path: Path, compress) -> None:
    from pretrain.data.text import compression

    path = tmp_path / ("a.bz2" if compress is bz2.compress else "a.xz")
    path.write_bytes(compress(b"\n" * (64 << 20)))
    with open(path, "rb") as raw:
        sizes = [len(chunk) for chunk in compression.content(raw, path.name)]
    assert (sum(sizes), max(sizes)) == (64 << 20, compression.CHUNK_BYTES)


@pytest.mark.parametrize(
    ("content", "before", "message"),
    [
        (b"good\n" * 9 + b"caf\xe9\n", "good\n" * 9 + "caf", r"from byte 48: it is not UTF-8 \(byte 0xe9"),
        (b"good\n" * 9 + b"\xc3", "good\n" * 9, r"from byte 45: it is not UTF-8 \(byte 0xc3: unexpected end"),
        ("漢".encode() * 9 + b"\xff", "漢" * 9, "from byte 27: it is not UTF-8"),
        (b"\xff\xfeh\0i\0", None, "it is UTF-16 or UTF-32, not UTF-8. Convert it: iconv"),
        (b"\xfe\xff\0h", None, "it is UTF-16"),
    ],
)
def test_what_stands_before_damage_in_a_text_file_is_kept(
    tmp_path: Path, content: bytes, before: str | None, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    *whole, damaged = _open(tmp_path / "a.txt").blocks()
    assert [text for block in whole for text in block.texts()] == ([] if before is None else [before])
    with pytest.raises(UserError, match=message):
        damaged.texts()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(LINES), "it is compressed, which its name does not say. Decompress it, or add .gz"),
        ("a.json", bz2.compress(LINES), "add .bz2 to its name"),
        ("a.txt", zstandard.compress(LINES), "add .zst to its name"),
        ("a.ndjson", lzma.compress(LINES), "add .xz to its name"),
        ("a.txt.gz", gzip.compress(gzip.compress(LINES)), "it is compressed"),
        ("a.txt", b"PK\x03\x04\x14", "it is a ZIP archive, which its name does not say"),
        ("a.jsonl", b"PAR1\x15\x04", "it is Parquet"),
        ("a.txt", POINTER, "it is a pointer of Git LFS, not the file itself. Fetch that: git lfs pull"),
        ("a.jsonl.gz", POINTER, "it is a pointer of Git LFS"),
        ("a.parquet", POINTER, "it is a pointer of Git LFS"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_explained(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (damaged,) = _open(tmp_path / name).blocks()
    with pytest.raises(UserError, match=message):
        damaged.texts()


def test_what_stands_before_damage_in_code_and_compressed_text_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# coding: utf-8\nx = 1\n\n# caf\xe9\n")
    cut = gzip.compress(b"".join(b"line %d\n" % n for n in range(9000)))[:-4000]
    (tmp_path / "a.txt.gz").write_bytes(cut)
    expected = {"a.py": "# coding: utf-8\nx = 1\n\n# caf", "a.txt.gz": "line 0\nline 1\n"}
    for name, before in expected.items():
        text, damaged = _open(tmp_path / name).blocks()
        assert text.texts()[0].startswith(before)
        with pytest.raises(UserError, match=name):
            damaged.texts()


def test_a_long_text_file_gives_the_documents_of_the_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(long_texts, "MAX_DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr("pretrain.data.text.compression.CHUNK_BYTES", 33)
    content = "".join(f"line {'x' * (number % 250)} größer\n" for number in range(100))
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    assert list(_open(tmp_path / "a.txt").texts()) == long_texts.cut_long(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "text": "x",\n "n": 1\n}\n', "one JSON object over several lines"),
        (b'[{"text": "x"}, {"text": "y"', "from record 2: .*"),
        (b'[{"text": "x"}] more', "from record 2: ValueError: 'm' stands where there should be nothing more"),
        (b'[{"text": "x"} {"text": "y"}]', "from record 2: ValueError: '{' stands where there should be , or ]"),
        (b'[{"text": "x"},\n 5]', "record 2: it should be a JSON object and is a int"),
        (b'[{"text": "x"},', "from record 2: EOFError: the file ends within its array"),
        (b'{"text": "a", "text": "b"}\n', "line 1, has 2 fields 'text'. Leave all but one"),
        (b"\xff\xfe{\0", "it is UTF-16"),
    ],
)
def test_json_that_is_no_list_of_records_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(_open(tmp_path / "a.json").texts())


def test_a_field_within_a_field_is_found_and_one_of_the_whole_name_comes_first(tmp_path: Path) -> None:
    records = [{"meta": {"text": "a", "l": {"x": 1}}}, {"meta.text": "b", "meta": {"text": "no"}}, {"meta": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    assert list(_open(tmp_path / "a.jsonl", text_field="meta.text").texts()) == ["a", "b", ""]
    with pytest.raises(UserError, match=r"line 1, has no field 'meta\.body'; its fields are meta\."):
        list(_open(tmp_path / "a.jsonl", text_field="meta.body").texts())
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records[:1] * 2)), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"meta": {"text": "a", "text": "b"}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1, has 2 fields 'text'"):
        list(_open(tmp_path / "c.jsonl", text_field="meta.text").texts())
    for condition, expected in (("meta.l.x=1", ["a", "a"]), ("meta.l.x>1", ["", ""])):
        assert list(_open(tmp_path / "b.jsonl", text_field="meta.text", filters=[condition]).texts()) == expected


COLUMNS = {
    "binary": pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary()),
    "large_binary": pyarrow.array([text.encode() for text in TEXTS], pyarrow.large_binary()),
    "large_string": pyarrow.array(TEXTS, pyarrow.large_string()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "dictionary of bytes": pyarrow.array([text.encode() for text in TEXTS]).dictionary_encode(),
}


def _write(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=64)
        return
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=64)


@pytest.mark.parametrize("largest", [1 << 25, 0])  # row groups read whole, and in batches
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("file", ["a.parquet", "a.arrow"])
def test_columns_of_every_type_that_holds_text_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str, nested: bool, largest: int
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", largest)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    column, field = COLUMNS[name], "text"
    languages = pyarrow.array([b"en", b"de"] * (len(TEXTS) // 2))
    if nested:
        column = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
        column, field = pyarrow.StructArray.from_arrays([column], names=["text"]), "meta.text"
    table = pyarrow.table({field.split(".")[0]: column, "language": languages, "id": range(len(TEXTS))})
    _write(tmp_path / file, table)
    assert list(_open(tmp_path / file, text_field=field).texts()) == TEXTS
    english = [text for text in _open(tmp_path / file, text_field=field, filters=["language=en"]).texts() if text]
    assert english == TEXTS[::2]


def test_rows_that_hold_no_text_are_named_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [b"good"] * 70 + [b"caf\xe9"] + [b"good"] * 9
    marked = pyarrow.Array.from_buffers(pyarrow.string(), 80, pyarrow.array(values).buffers())
    for largest in (1 << 25, 0):
        monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", largest)
        for column in (pyarrow.array(values), marked, marked.dictionary_encode()):
            _write(tmp_path / "a.parquet", pyarrow.table({"text": column}))
            found = [record for block in _open(tmp_path / "a.parquet").blocks() for record in block.records()]
            assert found[:70] + found[71:] == ["good"] * 79
            assert str(found[70]).startswith(
                f"{tmp_path}/a.parquet, row group 1, row 6, field 'text' holds bytes that are not UTF-8 (byte 3:"
            )


def test_tables_without_rows_or_the_field(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    assert list(_open(tmp_path / "a.parquet").texts()) == []
    _write(tmp_path / "a.parquet", pyarrow.table({"meta": [{"body": "x"}], "id": [1]}))
    with pytest.raises(
        UserError, match=r"no field 'meta\.text'; its fields are meta, meta\.body, id\. Set --text-field"
    ):
        list(_open(tmp_path / "a.parquet", text_field="meta.text").texts())


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    path = tmp_path / name

    def write(count: int) -> None:
        if name.endswith((".parquet", ".arrow")):
            _write(path, pyarrow.table({"text": TEXTS[:count]}))
        else:
            path.write_bytes(COMPRESS[".gz" if name.endswith(".gz") else ""](LINES[: 40 * count]))

    for later in (190, 30, 200):
        write(200)
        before = path.stat()
        source = _open(path)
        blocks = source.blocks()
        next(blocks)
        write(later)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(UserError, match=rf"{name} has changed while it was read: it "):
            [block.texts() for block in blocks]
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} has gone while it was read"):
        source.check_unchanged()


def test_endings() -> None:
    kinds = {
        "A.JSONL": ".jsonl",
        "a.json.XZ": ".json",
        "a.py.gz": None,
        "a.parquet.gz": None,
        "a.csv": None,
        "txt": None,
    }
    assert {name: kind_of(name) for name in kinds} == kinds
