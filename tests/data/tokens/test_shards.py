"""Token shards: what is written can be read by anyone, and damage is refused with the file's name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import TokenShards, open_shards
from pretrain.data.tokens import ShardWriter, token_dtype
from pretrain.errors import UserError

DESCRIPTION = {"vocab_size": 65536, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0}
MakeShards = Callable[..., TokenShards]


def test_shards_are_plain_numbers_on_disk(make_shards: MakeShards) -> None:
    shards = make_shards(2500)
    raw = [np.fromfile(Path(shards.location) / f"shard_{number:05d}.bin", dtype="<u2") for number in range(3)]
    assert np.array_equal(np.concatenate(raw), np.arange(2500))


def test_no_document_is_in_two_shards(make_shards: MakeShards) -> None:
    shards = make_shards(2500, shard_tokens=1000, document_tokens=7)
    assert [shard.tokens for shard in shards.shards] == [1001, 1001, 498]  # 1001 is the first multiple of 7 past 1000
    for shard in shards.shards:
        ends = np.fromfile(Path(shards.location) / shard.ends_file, dtype="<u8")
        assert len(ends) == shard.documents
        assert ends[-1] == shard.tokens
        assert (np.diff(ends[:-1]) == 7).all()


def test_a_document_longer_than_a_shard_makes_its_shard_longer(make_shards: MakeShards) -> None:
    shards = make_shards(2500, shard_tokens=100, document_tokens=1200)
    assert [(shard.tokens, shard.documents) for shard in shards.shards] == [(1200, 1), (1200, 1), (100, 1)]
    assert np.array_equal(shards.open_tokens(1), np.arange(1200, 2400))
    assert shards.open_ends(1).tolist() == [1200]


def test_shards_open_as_what_is_on_disk(shards_of_2500: TokenShards) -> None:
    start = 0
    for number, shard in enumerate(shards_of_2500.shards):
        tokens, ends = shards_of_2500.open_tokens(number), shards_of_2500.open_ends(number)
        assert np.array_equal(tokens, np.arange(start, start + shard.tokens))
        assert np.array_equal(ends, np.fromfile(Path(shards_of_2500.location) / shard.ends_file, dtype="<u8"))
        shards_of_2500.close(number)
        assert np.array_equal(tokens, shards_of_2500.open_tokens(number))  # arrays outlive their shard's closing
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1
        start += shard.tokens
    assert start == 2500


def test_head_is_the_first_tokens_across_shards(shards_of_2500: TokenShards) -> None:
    assert np.array_equal(shards_of_2500.head(700), np.arange(700))
    assert np.array_equal(shards_of_2500.head(9999), np.arange(2500))
    assert shards_of_2500.head(0).tolist() == []


def test_the_names_of_new_shards_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    writer = ShardWriter(tmp_path, np.dtype("<u2"), 100)
    for tokens, new_file in ((60, True), (30, False), (30, True), (1, False)):  # the third closes a shard
        synced.clear()
        writer.append(np.ones(tokens, "<u2"), np.array([tokens]))
        writer.commit()
        assert (str(tmp_path) in synced) == new_file


def test_a_corpus_of_many_files_keeps_few_of_them_open(tmp_path: Path) -> None:
    """In a process that may only open 200 files: what is mapped stays below, and all shards can be read."""
    program = """
import os, resource, sys
import numpy as np
from pathlib import Path
from pretrain.data.tokens import ShardWriter, open_shards
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
writer = ShardWriter(Path("many"), np.dtype("<u2"), 1)
writer.append(np.arange(500, dtype="<u2"), np.arange(1, 501))
writer.finish({"vocab_size": 65536, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0})
shards = open_shards("many", "size")
assert [shards.open_tokens(number)[0] for number in range(500)] == list(range(500))
assert all(shards.open_ends(number)[0] == 1 for number in range(500))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_a_file_cut_while_in_use_is_an_error_not_a_crash(make_shards: MakeShards) -> None:
    shards = make_shards(2500)
    for name in ("shard_00001.bin", "shard_00001.ends"):
        (Path(shards.location) / name).write_bytes((Path(shards.location) / name).read_bytes()[:-8])
    with pytest.raises(UserError, match=r"shard_00001\.bin ends at byte 1994"):
        shards.open_tokens(1)
    with pytest.raises(UserError, match=r"shard_00001\.ends has 1136 bytes"):
        shards.open_ends(1)


def test_token_type_follows_the_vocabulary(make_shards: MakeShards) -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
    shards = make_shards(70_000, shard_tokens=50_000, dtype="<u4")
    assert shards.open_tokens(1)[-1] == 69_999


def test_fingerprint_is_that_of_the_tokens(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(2500)
    shutil.copytree(Path(shards.location), tmp_path / "copy")
    assert open_shards(tmp_path / "copy").fingerprint == shards.fingerprint
    assert make_shards(2499).fingerprint != shards.fingerprint


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.ends"])
def test_a_missing_or_short_file_is_named(make_shards: MakeShards, name: str, verify: str) -> None:
    file = Path(make_shards(2500).location) / name
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{name} has {len(content) - 2} bytes and the manifest"):
        open_shards(file.parent, verify)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_shards(file.parent, verify)


@pytest.mark.parametrize("name", ["shard_00001.bin", "shard_00001.ends"])
def test_one_flipped_bit_is_found_by_the_full_check(make_shards: MakeShards, name: str) -> None:
    file = Path(make_shards(2500).location) / name
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    open_shards(file.parent, "size")
    with pytest.raises(UserError, match=rf"{name} .*corrupt"):
        open_shards(file.parent, "full")


def test_a_flipped_bit_is_found_to_within_a_block(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.dtype("<u4"), 1 << 40)
    part = np.arange(1 << 20, dtype="<u4")
    for _ in range(20):  # 80 MiB: blocks of 32, 32 and 16
        writer.append(part, np.array([len(part)]))
    writer.finish(DESCRIPTION | {"vocab_size": 1 << 20})
    entry = json.loads((tmp_path / "manifest.json").read_text())["shards"][0]
    content = (tmp_path / entry["file"]).read_bytes()
    blocks = [content[start : start + (32 << 20)] for start in range(0, len(content), 32 << 20)]
    assert entry["blocks_xxh3_64"] == [xxhash.xxh3_64_hexdigest(block) for block in blocks]
    assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(content)
    with open(tmp_path / entry["file"], "r+b") as file:
        file.seek(40 << 20)
        byte = file.read(1)[0]
        file.seek(40 << 20)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(UserError, match=f"corrupt at bytes {32 << 20} to {(64 << 20) - 1}\\."):
        open_shards(tmp_path)


def test_an_id_beyond_the_vocabulary_is_named(make_shards: MakeShards) -> None:
    path = Path(make_shards(2500).location) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 1500}))
    with pytest.raises(UserError, match=r"shard_00001\.bin has the id 1500 at token 499 \(byte 998\)"):
        open_shards(path.parent)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([7, 7, 14], "document 1 ends at token 7, not after"), ([7, 14, 21], "ends at token 21 of 28")],
)
def test_document_ends_that_do_not_fit_are_refused(make_shards: MakeShards, ends: list[int], message: str) -> None:
    folder = Path(make_shards(28).location)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    content = np.array(ends, dtype="<u8").tobytes()
    (folder / "shard_00000.ends").write_bytes(content)
    manifest["documents"] = manifest["shards"][0]["documents"] = len(ends)
    manifest["shards"][0]["ends_xxh3_128"] = xxhash.xxh3_128_hexdigest(content)  # wrong when written, not damaged
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        open_shards(folder)


def test_ranks_share_the_checksums_and_miss_none(make_shards: MakeShards) -> None:
    folder = Path(make_shards(5000).location)
    for number in range(5):
        _flip_one_bit(folder / f"shard_{number:05d}.bin")
        finders = [rank for rank in range(3) if _refuses(folder, rank)]
        assert finders == [number % 3]
        _flip_one_bit(folder / f"shard_{number:05d}.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=99), "made by a newer Evenkeel"),
        (lambda manifest: manifest.update(schema_version=0), "schema_version 0 and this version"),
        (lambda manifest: manifest.pop("tokens"), "KeyError 'tokens'"),
        (lambda manifest: manifest.update(dtype="uint17"), "not a manifest"),
        (lambda manifest: manifest["shards"][0].pop("bytes"), "not a manifest"),
        (lambda manifest: manifest["shards"].pop(), "contradicts itself"),
        (lambda manifest: manifest.update(dtype="uint32"), "contradicts itself"),
        (lambda manifest: manifest.update(documents=1), "hold 358 documents and it says 1"),
        (lambda manifest: manifest.update(vocab_size=1 << 17), "do not fit together"),
        (lambda manifest: manifest.update(eos_id=70_000), "do not fit together"),
        (lambda manifest: manifest["shards"][0].update(file="shard_00001.bin"), "lists a file twice"),
        (lambda manifest: manifest["shards"][0].update(tokens=-1), "has -1 tokens"),
        (lambda manifest: manifest["shards"][0].update(tokens=1001.0), "has 1001.0 tokens"),
        (lambda manifest: manifest["shards"][0].update(file="../shard_00000.bin"), "leads out of the folder"),
        (lambda manifest: manifest["shards"][0].update(ends_file="/etc/passwd"), "leads out of the folder"),
        (lambda manifest: manifest["shards"][0].update(file=".."), "leads out of the folder"),
    ],
)
def test_a_wrong_manifest_is_refused(make_shards: MakeShards, change: Callable[[dict], object], message: str) -> None:
    path = Path(make_shards(2500).location) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as caught:
        open_shards(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_a_corrupt_manifest_is_refused(make_shards: MakeShards, content: str) -> None:
    path = Path(make_shards(100).location) / "manifest.json"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        open_shards(path.parent)


def test_an_older_manifest_is_read(make_shards: MakeShards) -> None:
    path = Path(make_shards(2500).location) / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        del entry["blocks_xxh3_64"]
    path.write_text(json.dumps(manifest | {"schema_version": 1}))
    assert open_shards(path.parent).tokens == 2500


def test_folders_without_finished_shards_are_refused(tmp_path: Path, make_shards: MakeShards) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_shards(tmp_path / "nowhere")
    Path(make_shards(100).location).rename(tmp_path / "train")
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


def test_a_document_can_come_in_pieces(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype="<u2")
    writer = ShardWriter(tmp_path, np.dtype("<u2"), 300)
    writer.append(tokens[:100], np.array([40]))
    writer.append(tokens[100:700], np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="has no end"):
        writer.finish(DESCRIPTION)
    writer.append(tokens[700:], np.array([50, 300]))
    writer.finish(DESCRIPTION)
    shards = open_shards(tmp_path)
    assert [shards.open_ends(number).tolist() for number in range(2)] == [[40, 750], [250]]
    assert np.array_equal(np.concatenate([shards.open_tokens(0), shards.open_tokens(1)]), tokens)


@pytest.fixture(scope="module")
def shards_of_2500(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, np.dtype("<u2"), 300)
    _append_each(writer, np.split(np.arange(2500, dtype="<u2"), range(11, 2500, 11)))
    writer.finish(DESCRIPTION)
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
