"""Parquet and Arrow: damage is noticed, odd columns are read or refused, and a few bytes do not become gigabytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from pretrain.data.text import Source, open_source, readers
from pretrain.errors import UserError

TEXTS = [f"text {number}" for number in range(40)]
TABLE = pyarrow.table({"text": TEXTS})


def _open(path: Path, text_field: str = "text") -> Source:
    return open_source([str(path)], text_field=text_field, subset=None, split="train")


def _stream(path: Path) -> tuple[bytes, int]:
    """An Arrow stream of four record batches, and the place where the third begins."""
    with pyarrow.ipc.new_stream(path, TABLE.schema) as stream:
        stream.write_table(TABLE, max_chunksize=10)
    with pyarrow.memory_map(str(path)) as raw:
        stream = pyarrow.ipc.open_stream(raw)
        stream.read_next_batch()
        stream.read_next_batch()
        return path.read_bytes(), raw.tell()


def test_an_arrow_stream_cut_between_messages_is_refused(tmp_path: Path) -> None:
    whole, border = _stream(tmp_path / "a.arrow")
    for cut in (border, len(whole) - 8):
        (tmp_path / "a.arrow").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"a\.arrow, from record batch \d: EOFError: .*, at byte {cut}\."):
            list(_open(tmp_path / "a.arrow").texts())


def test_arrow_streams_one_after_the_other_are_refused(tmp_path: Path) -> None:
    whole, _ = _stream(tmp_path / "a.arrow")
    (tmp_path / "a.arrow").write_bytes(whole * 2)
    with pytest.raises(
        UserError,
        match=rf"record batch 4: ValueError: the stream ends at byte {len(whole)}, and the",
    ):
        list(_open(tmp_path / "a.arrow").texts())


@pytest.mark.parametrize("largest", [1 << 25, 0])  # read whole, and in batches
def test_the_checksums_of_parquet_pages_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", largest)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(TABLE, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    assert content.count(b"text 17") == 1
    path.write_bytes(content.replace(b"text 17", b"text 71"))
    with pytest.raises(UserError, match=r"a\.parquet, row group 0: OSError: .*CRC"):
        list(_open(path).texts())


def _write_parquet(path: Path, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, path)


def _write_arrow(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


WRITERS = {"a.parquet": _write_parquet, "a.arrow": _write_arrow}


@pytest.mark.parametrize("name", WRITERS)
def test_two_columns_of_one_name_are_refused_only_where_they_are_read(tmp_path: Path, name: str) -> None:
    columns = [pyarrow.array(TEXTS)] * 3
    WRITERS[name](tmp_path / name, pyarrow.Table.from_arrays(columns, names=["text", "text", "body"]))
    with pytest.raises(UserError, match=rf"{name} has 2 fields 'text'\. Rename"):
        list(_open(tmp_path / name).texts())
    assert list(_open(tmp_path / name, text_field="body").texts()) == TEXTS


def test_what_arrow_cannot_read_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_parquet(tmp_path / "a.parquet", TABLE)

    def read_row_group(*arguments: object, **options: object) -> None:
        raise pyarrow.lib.ArrowNotImplementedError("Support for codec 'lzo' not built")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", read_row_group)
    with pytest.raises(UserError, match=r"a\.parquet, row group 0: .*codec 'lzo' not built"):
        list(_open(tmp_path / "a.parquet").texts())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("typed", [False, True])
def test_long_texts_that_repeat_come_in_small_blocks(tmp_path: Path, name: str, typed: bool) -> None:
    texts = [f"{number % 10}" * 20_000 for number in range(2000)]
    column = pyarrow.array(texts)
    WRITERS[name](tmp_path / name, pyarrow.table({"text": column.dictionary_encode() if typed else column}))
    taken = [block.texts() for block in _open(tmp_path / name).blocks()]
    assert [text for block in taken for text in block] == texts
    assert max(sum(map(len, block)) for block in taken) < 6_000_000


def test_a_row_group_that_may_unfold_counts_as_what_it_may_become(tmp_path: Path) -> None:
    texts = ["x" * 20_000] * 1000
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (block,) = _open(tmp_path / "a.parquet").blocks()
    assert block.bytes >= sum(map(len, block.texts()))


def test_a_column_with_a_point_in_its_name_counts(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "a.parquet", pyarrow.table({"a.text": TEXTS, "a": [{"text": "x"}] * len(TEXTS)}))
    (block,) = _open(tmp_path / "a.parquet", text_field="a.text").blocks()
    assert block.texts() == TEXTS
    assert block.bytes >= sum(map(len, TEXTS))
