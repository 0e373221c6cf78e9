"""Folders of samples of MosaicML and Lightning become shards: documents, kinds of number, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.tokenizer import TokenizerInfo
from pretrain.data.tokens import import_export, open_shards
from pretrain.data.tokens.import_export import import_tokens
from pretrain.errors import UserError
from tests.support.token_formats import documents, write_litdata, write_llmc, write_mds

TOKENIZER = TokenizerInfo(backend="", vocab_size=1000, eos_id=0, bos_id=None, first_ids=(), fingerprint="abc")
LITDATA_KINDS = {"int32": "no_header_tensor:16", "int64": "no_header_tensor:17", "uint16": "no_header_numpy:5"}
LENGTHS = [5, 300, 1, 44, 120, 2]


def imported(format: str, source: Path, out: Path) -> list[list[int]]:
    """Return the documents of the shards that an import makes."""
    import_tokens(format, source, out, TOKENIZER, shard_tokens=200)
    shards, found = open_shards(out), []
    for number in range(len(shards.shards)):
        ends = shards.open_ends(number)
        parts = np.split(np.asarray(shards.open_tokens(number)), ends[:-1].astype(np.int64))
        found += [part.tolist() for part in parts]
    return found


def write(format: str, folder: Path, files: list[list[np.ndarray]], dtype: str) -> None:
    if format == "mds":
        write_mds(folder, files, dtype)
    else:
        write_litdata(folder, files, dtype, LITDATA_KINDS[dtype])


@pytest.mark.parametrize("dtype", LITDATA_KINDS)
@pytest.mark.parametrize("format", ["mds", "litdata"])
def test_samples_that_are_documents_stay_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], format: str, dtype: str
) -> None:
    monkeypatch.setattr(import_export, "_BLOCK_TOKENS", 70)
    files = [documents(seed, 1000, LENGTHS, separator=0) for seed in range(2)]
    bare = [[np.where(sample == 0, 1, sample) for sample in file] for file in files]
    write(format, tmp_path / "theirs", bare, dtype)
    found = imported(format, tmp_path / "theirs", tmp_path / "ours")
    assert found == [sample.tolist() for file in bare for sample in file]
    assert "no token is the separator, so each sample is a document (id 0)" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["mds", "litdata"])
def test_a_stream_cut_into_samples_is_cut_at_separators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    files = [documents(seed, 1000, [5, 30, 1, 28]) for seed in range(2)]
    samples = [np.split(np.concatenate(file), 4) for file in files]
    if format == "mds":
        write_mds(tmp_path / "theirs", samples, "int32", fixed=True)
    else:
        write(format, tmp_path / "theirs", samples, "int32")
    found = imported(format, tmp_path / "theirs" / "index.json", tmp_path / "ours")
    assert found == [document.tolist() for file in files for document in file]
    assert "documents end at separators (id 0)" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["mds", "litdata"])
def test_a_file_without_samples_has_no_documents(tmp_path: Path, format: str) -> None:
    files = [documents(1, 1000, LENGTHS), []]
    write(format, tmp_path / "theirs", files, "int32")
    assert imported(format, tmp_path / "theirs", tmp_path / "ours") == [sample.tolist() for sample in files[0]]


def change(index: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(index.read_text(encoding="utf-8"))
    edit(content)
    index.write_text(json.dumps(content), encoding="utf-8")


def cut(folder: Path) -> None:
    path = next(folder.glob("shard.00000.mds"), folder / "chunk-0-0.bin")
    path.write_bytes(path.read_bytes()[:-3])


def edit_shard(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "index.json", lambda content: content["shards"][0].update(changes))


def edit_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "index.json", lambda content: content["config"].update(changes))


def corrupt_offsets(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[8:12] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)


def shrink_a_sample(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    content[first : first + 4] = (2).to_bytes(4, "little")  # the bytes of its text
    path.write_bytes(content)


ZIPPED = {"basename": "shard.00000.mds.zstd", "bytes": 9, "hashes": {}}
FAULTS = {
    "mds, cut": ("mds", cut, r"shard\.00000\.mds has \d+ bytes and its index says \d+"),
    "litdata, cut": ("litdata", cut, r"chunk-0-0\.bin has \d+ bytes and its index says \d+"),
    "places": ("mds", corrupt_offsets, "the places of its samples are not in order"),
    "sample": ("mds", shrink_a_sample, r"sample 0 \(byte \d+\) is not as its columns say"),
    "number": ("mds", edit_shard(samples=5), "another number of samples than the 5 of its index"),
    "version": ("mds", edit_shard(version=3), "format 'mds', version 3. Only mds, version 2"),
    "bytes": ("mds", edit_shard(column_encodings=["str", "bytes"]), "tokens as 'bytes', which does not say"),
    "floats": ("mds", edit_shard(column_encodings=["str", "ndarray:float32"]), "tokens as 'ndarray:float32'"),
    "no column": (
        "mds",
        edit_shard(column_names=["a", "b"], column_encodings=["str", "int"]),
        r"has the columns a \(str\), b \(int\), of which none is called tokens or input_ids",
    ),
    "no sizes": (
        "mds",
        edit_shard(column_sizes=None),
        "column_names, column_encodings and column_sizes are not lists of",
    ),
    "fewer names": ("mds", edit_shard(column_names=["tokens"]), "column_sizes are not lists of one length"),
    "sizes of text": ("mds", edit_shard(column_sizes=["4", None]), "the last one of whole numbers"),
    "shape": ("mds", edit_shard(column_encodings=["str", "ndarray:int32:4,x"]), "tokens as 'ndarray:int32:4,x'"),
    "raw data": ("mds", edit_shard(raw_data="x"), "a shard whose raw_data is 'x', and a mapping was due"),
    "outside": ("mds", edit_shard(raw_data={"basename": "../x", "bytes": 1}), "lies outside of its folder"),
    "missing": ("mds", edit_shard(raw_data={"basename": "x", "bytes": 1}), "x is missing, and .*index.json names it"),
    "zipped": (
        "mds",
        edit_shard(raw_data={"basename": "x", "bytes": 1}, zip_data=ZIPPED, compression="zstd"),
        r"shard\.00000\.mds\.zstd is compressed \(zstd\)",
    ),
    "compressed": ("litdata", edit_config(compression="zstd"), "compressed or encrypted"),
    "several": ("litdata", edit_config(data_format=["int", "str"]), r"samples of \['int', 'str'\]"),
    "no data format": ("litdata", edit_config(data_format=3), "samples of 3, and only those"),
    "config": (
        "litdata",
        lambda folder: change(folder / "index.json", lambda content: content.update(config=[])),
        "no mapping 'config'",
    ),
    "tensor of floats": ("litdata", edit_config(data_format=["no_header_tensor:1"]), "one tensor or array of integers"),
    "dim": (
        "litdata",
        lambda folder: change(folder / "index.json", lambda content: content["chunks"][0].update(dim=3)),
        r"has \d+ tokens and .*index.json says 3",
    ),
    "not JSON": (
        "mds",
        lambda folder: (folder / "index.json").write_text("{", encoding="utf-8"),
        "cannot read .*index.json",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_or_other_folders_are_refused_and_nothing_is_made(tmp_path: Path, fault: str) -> None:
    format, damage, message = FAULTS[fault]
    write(format, tmp_path / "theirs", [documents(1, 1000, LENGTHS)], "int32")
    damage(tmp_path / "theirs")
    with pytest.raises(UserError, match=message):
        import_tokens(format, tmp_path / "theirs", tmp_path / "ours", TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_other_format_is_named(tmp_path: Path) -> None:
    write("mds", tmp_path / "mds", [documents(1, 1000, LENGTHS)], "int32")
    write("litdata", tmp_path / "litdata", [documents(1, 1000, LENGTHS)], "int32")
    for asked, there in (("litdata", "mds"), ("mds", "litdata"), ("megatron", "mds")):
        with pytest.raises(UserError, match=f"looks like files of the format {there}: use --import {there}"):
            import_tokens(asked, tmp_path / there, tmp_path / "ours", TOKENIZER)
        with pytest.raises(UserError, match=rf"Import them: tools/prepare_data\.py --import {there}\."):
            open_shards(tmp_path / there)


LLMC_FAULTS = {
    "cut": (lambda content: content[:-1], r"has \d+ bytes, and the 472 uint16 tokens of its header take 1968"),
    "header": (lambda content: content[:1000], "has 1000 bytes, less than llm.c's header of 1024"),
    "version": (
        lambda content: content[:4] + (3).to_bytes(4, "little") + content[8:],
        r"begins with the numbers 20240520 and 3, and llm.c's files of tokens with 20240520 and 1 \(uint16\)",
    ),
    "more": (lambda content: content[:16] + b"x" + content[17:], r"more in its header than llm.c writes \(number 4\)"),
    "id": (
        lambda content: content[:1034] + (999 + 7).to_bytes(2, "little") + content[1036:],
        r"has the id 1006 at token 5 \(byte 1034\)",
    ),
}


@pytest.mark.parametrize("fault", LLMC_FAULTS)
def test_damaged_files_of_llmc_are_refused(tmp_path: Path, fault: str) -> None:
    damage, message = LLMC_FAULTS[fault]
    path = tmp_path / "train.bin"
    write_llmc(path, documents(1, 1000, LENGTHS), "uint16")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        import_tokens("llmc", path, tmp_path / "ours", TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_documents_that_begin_with_the_separator_have_it_at_the_end(tmp_path: Path) -> None:
    """So prepare llm.c and modded-nanogpt: each document is the separator and its text."""
    write_llmc(tmp_path / "a.bin", [np.array([0, 5, 6]), np.array([0, 7])], "uint16")
    write_llmc(tmp_path / "b.bin", [np.array([0, 8])], "uint16")
    assert imported("llmc", tmp_path, tmp_path / "ours") == [[0], [5, 6, 0], [7], [0], [8]]
