"""Megatron and datatrove files are trained on as they are, and refused when they do not fit together."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.tokens import Shard, TokenShards, external_files, external_shards, open_shards
from pretrain.errors import UserError
from tests.support.token_formats import documents, write_datatrove, write_megatron

LENGTHS = [5, 0, 300, 1, 0, 0, 44, 1200, 2, 0]
HEADER_BYTES = 34


@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 50_000), ("int32", 100_000)])
@pytest.mark.parametrize("name", ["text_document", "text_document.idx", "text_document.bin", ""])
def test_megatron_files_open_by_any_of_their_names(tmp_path: Path, dtype: str, vocab_size: int, name: str) -> None:
    written = documents(0, vocab_size, LENGTHS)
    write_megatron(tmp_path / "text_document", written, dtype)
    shards = open_shards(tmp_path / name, vocab_size=vocab_size)
    assert shards.dtype == np.dtype(dtype)
    assert_holds(shards, written)


def test_a_folder_of_megatron_files_is_one_corpus_in_order_of_names(tmp_path: Path) -> None:
    first, second = documents(1, 1000, LENGTHS), documents(2, 1000, LENGTHS[::-1])
    write_megatron(tmp_path / "b.1_text", second, "uint16")
    write_megatron(tmp_path / "a_text", first, "uint16")
    assert_holds(open_shards(tmp_path), [*first, *second])


def test_a_megatron_document_is_all_of_its_sequences(tmp_path: Path) -> None:
    written = documents(0, 1000, [10, 20, 5])
    write_megatron(tmp_path / "x", written, "int32", sequences=[[3, 7], [20], [1, 0, 4]])
    assert_holds(open_shards(tmp_path / "x"), written)


@pytest.mark.parametrize(("size", "vocab_size"), [(2, 50_000), (4, 100_000)])
@pytest.mark.parametrize("metadata", [True, False])
def test_datatrove_folders_open(tmp_path: Path, size: int, vocab_size: int, metadata: bool) -> None:
    parts = [documents(0, vocab_size, LENGTHS), [], documents(2, vocab_size, LENGTHS[::-1])]
    for number, part in enumerate(parts):  # the second had no text to write
        write_datatrove(tmp_path / f"{number:05d}_unshuffled.ds", part, size, metadata)
    shards = open_shards(tmp_path, vocab_size=vocab_size)
    assert shards.dtype.itemsize == size
    assert_holds(shards, [*parts[0], *parts[2]])


@pytest.mark.parametrize("format", ["megatron", "datatrove"])
def test_large_files_are_cut_into_shards_at_document_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(external_shards, "SHARD_TOKENS", 300)
    monkeypatch.setattr(external_files, "INDEX_BLOCK", 7)
    written = documents(0, 1000, LENGTHS * 3 + [0, 0])
    if format == "megatron":
        write_megatron(tmp_path / "x", written, "uint16")
    else:
        write_datatrove(tmp_path / "x.ds", written, 2)
    shards = open_shards(tmp_path, vocab_size=1000)
    assert [shard.tokens for shard in shards.shards] == [305, 1245, 307, 1245, 307, 1245, 2]
    assert_holds(shards, written)
    assert np.array_equal(shards.head(2000), np.concatenate(written)[:2000])
    assert shards.format == format


def test_the_head_of_a_shard_far_into_a_file_is_all_that_is_read(tmp_path: Path) -> None:
    written = documents(0, 1000, [300, 50])
    write_megatron(tmp_path / "x", written, "uint16")
    shards, read = open_shards(tmp_path), []
    shards.shards = [Shard("x.bin", 50, 1, 100, first_token=300)]
    files_read = shards.files.read
    shards.files.read = lambda *place: read.append(files_read(*place)) or read[-1]
    assert np.array_equal(shards.head(20), written[1][:20])
    assert list(map(len, read)) == [40]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    fingerprints = []
    for number, (seed, lengths) in enumerate([(0, [50, 50]), (0, [50, 50]), (1, [50, 50]), (0, [49, 51])]):
        (tmp_path / str(number)).mkdir()
        write_megatron(tmp_path / str(number) / "x", documents(seed, 1000, lengths), "uint16")
        fingerprints.append(open_shards(tmp_path / str(number)).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_ids_beyond_the_vocabulary_are_named_by_the_rank_that_reads_them(tmp_path: Path) -> None:
    written = documents(0, 1000, [100, 100])
    written[1][20] = 1000
    write_megatron(tmp_path / "a", documents(1, 1000, [50]), "int32")
    write_megatron(tmp_path / "b", written, "int32")
    open_shards(tmp_path, vocab_size=1001)
    open_shards(tmp_path, "size", vocab_size=1000)
    open_shards(tmp_path, vocab_size=1000, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"b\.bin has the id 1000 at token 120 \(byte 480\)"):
        open_shards(tmp_path, vocab_size=1000, rank=1, world_size=2)
    written[1][20] = -1
    write_megatron(tmp_path / "b", written, "int32")
    with pytest.raises(UserError, match=r"b\.bin has the id -1 at token 120"):
        open_shards(tmp_path, vocab_size=1000)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("x.bin", lambda content: content[:-1], r"x\.bin has 399 bytes and its index x\.idx describes 400"),
        ("x.bin", lambda content: content + b"\0\0", r"x\.bin has 402 bytes"),
        ("x.bin", None, r"x\.bin is missing"),
        ("x.idx", lambda content: content[:20], "not a Megatron index"),
        ("x.idx", lambda content: b"NNIDIDX" + content[7:], "not a Megatron index"),
        ("x.idx", lambda content: content[:-8], r"x\.idx has 74 bytes, and its 2 sequences and 3 document marks"),
        ("x.idx", lambda content: content + b"\0\0", "multimodal"),
        ("x.idx", lambda content: _patched(content, 9, struct.pack("<Q", 2)), "version 2"),
        ("x.idx", lambda content: _patched(content, 17, b"\x07"), "code 7"),
        ("x.idx", lambda content: _patched(content, 17, b"\x63"), "code 99"),
        ("x.idx", lambda content: _patched(content, 17, b"\x04"), "says that sequence 1"),
        ("x.idx", lambda content: _patched(content, HEADER_BYTES, struct.pack("<i", -1)), "sequence 0 has -1 tokens"),
        ("x.idx", lambda content: _patched(content, HEADER_BYTES + 16, struct.pack("<q", 2)), "sequence 1 has 100"),
        ("x.idx", lambda content: _patched(content, HEADER_BYTES + 32, struct.pack("<q", 9)), "document marks"),
        ("x.idx", lambda content: _patched(content, HEADER_BYTES + 40, struct.pack("<q", 1)), "hold 1 sequences"),
    ],
)
def test_damaged_megatron_files_are_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    write_megatron(tmp_path / "x", documents(0, 1000, [100, 100]), "uint16")
    _damage(tmp_path / name, damage)
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path / "x.idx")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("x.ds", lambda content: content[:-2], r"x\.ds\.index says that the last document ends at token 200.* has 199"),
        ("x.ds", lambda content: content[:-1], r"x\.ds has 399 bytes"),
        ("x.ds.index", None, r"x\.ds has no x\.ds\.index"),
        ("x.ds.index", lambda content: content[:-1], r"x\.ds\.index has 15 bytes"),
        ("x.ds.index", lambda content: b"", r"x\.ds\.index has 0 bytes"),
        ("x.ds.index", lambda content: content[8:] + content[:8], "document 1 ends before it begins"),
        ("x.ds.index", lambda content: b"\xff" * 8 + content[8:], "document 0 ends before it begins"),
        ("x.ds.metadata", lambda content: b"gpt2|3\n", "begins with 'gpt2|3'"),
        ("x.ds.metadata", lambda content: b"gpt2|4\n", "ends at token 200, and the file of tokens has 100"),
    ],
)
def test_damaged_datatrove_files_are_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    write_datatrove(tmp_path / "x.ds", documents(0, 1000, [100, 100]), 2)
    _damage(tmp_path / name, damage)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        open_shards(tmp_path)


def test_loss_masks_are_not_passed_over(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "x.ds", documents(0, 1000, [100]), 2)
    (tmp_path / "x.ds.loss").write_bytes(b"\1" * 100)
    with pytest.raises(UserError, match="masks tokens from the loss"):
        open_shards(tmp_path)


def test_mixed_kinds_of_tokens_are_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", documents(0, 1000, [100]), "uint16")
    write_megatron(tmp_path / "b", documents(0, 1000, [100]), "int32")
    with pytest.raises(UserError, match=r"a\.bin holds uint16 tokens and .*b\.bin int32"):
        open_shards(tmp_path)


def test_folders_that_hold_nothing_to_train_on_say_so(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [np.empty(0)], "uint16")
    with pytest.raises(UserError, match="hold no tokens"):
        open_shards(tmp_path)
    for name in ("raw/part.npy", "train.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\1\0\2\0")
    for location in ("raw", "train.bin"):
        with pytest.raises(UserError, match="Import them"):
            open_shards(tmp_path / location)


def assert_holds(shards: TokenShards, written: list[np.ndarray]) -> None:
    """Assert that the shards are the documents that are not empty, in order and whole."""
    found = []
    for number, shard in enumerate(shards.shards):
        tokens, ends = shards.open_tokens(number), shards.open_ends(number)
        assert (len(tokens), len(ends), tokens.nbytes) == (shard.tokens, shard.documents, shard.bytes)
        assert ends[-1] == shard.tokens
        found += np.split(tokens, ends[:-1])
        shards.close(number)
    written = [document for document in written if len(document)]
    assert len(found) == len(written) == shards.documents
    assert all(np.array_equal(*pair) for pair in zip(found, written, strict=True))
    assert shards.tokens == sum(map(len, written))
    assert (shards.vocab_size, shards.eos_id, shards.tokenizer_fingerprint, shards.text_bytes) == (None,) * 4


def _patched(content: bytes, offset: int, patch: bytes) -> bytes:
    return content[:offset] + patch + content[offset + len(patch) :]


def _damage(path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
