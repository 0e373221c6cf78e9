"""Token shards: what is written can be read by anyone, and damage is refused with the file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import TokenShards, open_shards
from pretrain.data.tokens.shards import ShardWriter, token_dtype
from pretrain.errors import UserError

MakeShards = Callable[..., TokenShards]


def test_shards_are_plain_numbers_on_disk(make_shards: MakeShards) -> None:
    shards = make_shards(2500)
    raw = [np.fromfile(shards.folder / f"shard_{number:05d}.bin", dtype="<u2") for number in range(3)]
    assert np.array_equal(np.concatenate(raw), np.arange(2500))


def test_no_document_is_in_two_shards(make_shards: MakeShards) -> None:
    shards = make_shards(2500, shard_tokens=1000, document_tokens=7)
    assert [shard.tokens for shard in shards.shards] == [1001, 1001, 498]  # 1001 is the first multiple of 7 past 1000
    for shard in shards.shards:
        ends = np.fromfile(shards.folder / shard.ends_file, dtype="<u8")
        assert len(ends) == shard.documents
        assert ends[-1] == shard.tokens
        assert (np.diff(ends[:-1]) == 7).all()


@given(cuts=st.lists(st.integers(0, 2500), min_size=2, max_size=2).map(sorted))
def test_reading_ignores_shard_borders(shards_of_2500: TokenShards, cuts: list[int]) -> None:
    assert np.array_equal(shards_of_2500.read(*cuts), np.arange(*cuts))


def test_reading_outside_is_an_error(make_shards: MakeShards) -> None:
    with pytest.raises(IndexError, match="within the 100"):
        make_shards(100).read(90, 101)


def test_token_type_follows_the_vocabulary(make_shards: MakeShards) -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
    shards = make_shards(70_000, shard_tokens=50_000, dtype="<u4")
    assert shards.read(69_999, 70_000).tolist() == [69_999]


def test_fingerprint_is_that_of_the_tokens(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(2500)
    shutil.copytree(shards.folder, tmp_path / "copy")
    assert open_shards(tmp_path / "copy").fingerprint == shards.fingerprint
    assert make_shards(2499).fingerprint != shards.fingerprint


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.ends"])
def test_a_missing_or_short_file_is_named(make_shards: MakeShards, name: str, verify: str) -> None:
    file = make_shards(2500).folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{name} has {len(content) - 2} bytes and the manifest"):
        open_shards(file.parent, verify)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_shards(file.parent, verify)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.ends"])
def test_one_flipped_bit_is_found_by_the_full_check(make_shards: MakeShards, name: str) -> None:
    file = make_shards(2500).folder / name
    _flip_one_bit(file)
    open_shards(file.parent, "size")
    with pytest.raises(UserError, match=f"{name} has the checksum"):
        open_shards(file.parent, "full")


def test_ranks_share_the_checksums_and_miss_none(make_shards: MakeShards) -> None:
    folder = make_shards(5000).folder
    for number in range(5):
        _flip_one_bit(folder / f"shard_{number:05d}.bin")
        finders = [rank for rank in range(3) if _refuses(folder, rank)]
        assert finders == [number % 3]
        _flip_one_bit(folder / f"shard_{number:05d}.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=99), "schema_version 99"),
        (lambda manifest: manifest.pop("tokens"), "KeyError 'tokens'"),
        (lambda manifest: manifest.update(dtype="uint17"), "not a manifest"),
        (lambda manifest: manifest["shards"][0].pop("bytes"), "not a manifest"),
        (lambda manifest: manifest["shards"].pop(), "contradicts itself"),
        (lambda manifest: manifest.update(dtype="uint32"), "contradicts itself"),
    ],
)
def test_a_wrong_manifest_is_refused(make_shards: MakeShards, change: Callable[[dict], object], message: str) -> None:
    path = make_shards(2500).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as caught:
        open_shards(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_a_corrupt_manifest_is_refused(make_shards: MakeShards, content: str) -> None:
    path = make_shards(100).folder / "manifest.json"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        open_shards(path.parent)


def test_folders_without_finished_shards_are_refused(tmp_path: Path, make_shards: MakeShards) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_shards(tmp_path / "nowhere")
    make_shards(100).folder.rename(tmp_path / "train")
    with pytest.raises(UserError, match="holds train and val"):
        open_shards(tmp_path)


@settings(max_examples=25)  # it waits for the disk
@given(
    documents=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    commit_after=st.integers(0, 30),
    shard_tokens=st.integers(1, 100),
)
def test_a_writer_goes_on_from_any_commit(
    tmp_path_factory: pytest.TempPathFactory, documents: list[int], commit_after: int, shard_tokens: int
) -> None:
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    contents = [np.full(length, number, dtype="<u2") for number, length in enumerate(documents)]

    writer = ShardWriter(whole, np.dtype("<u2"), shard_tokens)
    _append_each(writer, contents)
    writer.finish({})

    writer = ShardWriter(broken, np.dtype("<u2"), shard_tokens)
    _append_each(writer, contents[:commit_after])
    state = json.loads(json.dumps(writer.commit()))
    _append_each(writer, contents[commit_after:])
    writer.finish({})  # everything after the commit, the manifest too, is what a killed writer may have left
    writer = ShardWriter(broken, np.dtype("<u2"), shard_tokens, state)
    _append_each(writer, contents[commit_after:])
    writer.finish({})

    assert _contents(whole) == _contents(broken)


def test_a_writer_refuses_files_shorter_than_its_state(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.dtype("<u2"), 100)
    _append_each(writer, [np.zeros(10, dtype="<u2")])
    state = writer.commit()
    (tmp_path / "shard_00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="shorter than"):
        ShardWriter(tmp_path, np.dtype("<u2"), 100, state)


@pytest.fixture(scope="module")
def shards_of_2500(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, np.dtype("<u2"), 300)
    _append_each(writer, np.split(np.arange(2500, dtype="<u2"), range(11, 2500, 11)))
    writer.finish({"vocab_size": 65536, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0})
    return open_shards(folder)


def _append_each(writer: ShardWriter, documents: list[np.ndarray]) -> None:
    for document in documents:
        writer.append(document, np.array([len(document)]))


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _refuses(folder: Path, rank: int) -> bool:
    try:
        open_shards(folder, rank=rank, world_size=3)
    except UserError:
        return True
    return False
