"""Shuffling: the same documents in a mixed order that depends on the seed alone, and the same bytes after any stop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import TokenShards, open_shards
from pretrain.data.prepare import preparation
from pretrain.data.prepare.shuffle import Shuffled
from pretrain.data.tokenizer import TokenizerInfo
from pretrain.data.tokens.writer import ShardWriter
from pretrain.errors import UserError
from tests.support.prepared import Stopped, contents, documents_of, manifest_of, prepare_files, stop_after

SPLITS = ("train", "val", "held_out")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.prepare.shuffle.BLOCK_DOCUMENTS", 17)


def test_the_documents_are_those_of_the_source_in_another_order(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "plain")
    shards = prepare_files(corpus, tokenizer_info, tmp_path / "out", shuffle_seed=5)
    for split in SPLITS:
        plain, shuffled = documents_of(tmp_path / "plain" / split), documents_of(tmp_path / "out" / split)
        assert plain != shuffled
        assert sorted(plain) == sorted(shuffled)
        manifests = [manifest_of(tmp_path / out / split) for out in ("plain", "out")]
        assert manifests[1]["shuffle"] == {"seed": 5}
        for same in ("sources", "text_bytes", "tokens", "documents", "source", "eos_id", "split"):
            assert manifests[0][same] == manifests[1][same]
    assert len(shards["train"].shards) > 3
    assert not (tmp_path / "out" / ".unshuffled").exists()


@pytest.mark.usefixtures("small_blocks")
def test_only_the_seed_decides_the_order(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "out", shuffle_seed=5)
    prepare_files(corpus, tokenizer_info, tmp_path / "seed", shuffle_seed=6)
    prepare_files(corpus, tokenizer_info, tmp_path / "workers", shuffle_seed=5, workers=3)
    monkeypatch.setattr("pretrain.data.prepare.shuffle.BLOCK_TOKENS", 300)  # many documents are longer
    prepare_files(corpus, tokenizer_info, tmp_path / "blocks", shuffle_seed=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "workers") == contents(tmp_path / "blocks")
    assert documents_of(tmp_path / "out/train") != documents_of(tmp_path / "seed/train")


def test_neighbours_come_from_any_two_places(tmp_path: Path) -> None:
    """In four corpora of 5,000 documents, the origin of a document says nothing about its place or its neighbour."""
    folders, per_folder = 4, 5000
    pieces = [_corpus_of(tmp_path / str(number), number, per_folder) for number in range(folders)]
    with ThreadPoolExecutor(2) as pool:
        blocks = list(Shuffled(pieces, 3, pool).blocks(0))
    tokens = np.concatenate([tokens for tokens, _ in blocks]).reshape(-1, 2)
    assert sorted(map(tuple, tokens.tolist())) == [(a, b) for a in range(folders) for b in range(per_folder)]
    origin = tokens[:, 0].astype(int)
    eighths = np.arange(len(tokens)) * 8 // len(tokens)
    number = np.diff(tokens[:, 1].astype(int)) * 8 // (2 * per_folder)  # how far apart neighbours were: not near 0
    assert _chi_square(origin[:-1], origin[1:], folders, folders) < 30  # 9 degrees of freedom: p = 0.0004
    assert _chi_square(eighths, origin, 8, folders) < 50  # 21: p = 0.0004
    assert _chi_square(eighths, tokens[:, 1].astype(int) * 8 // per_folder, 8, 8) < 90  # 49: p = 0.0003
    assert np.mean((number == 0) | (number == -1)) < 0.5  # independent: 7/16 lie within a quarter of each other


@pytest.mark.usefixtures("small_units", "small_blocks", "eager")
def test_a_shuffle_stopped_anywhere_ends_with_the_same_bytes(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_files(corpus, tokenizer_info, tmp_path / "whole", shuffle_seed=5)
    for stop in (1, 8, 10):  # blocks: 8 of train, 3 of val, 1 of held_out
        out = tmp_path / f"out{stop}"
        stop_after(monkeypatch, 4)
        with pytest.raises(Stopped):
            prepare_files(corpus, tokenizer_info, out, shuffle_seed=5)
        with monkeypatch.context() as patch:
            _stop_after_blocks(patch, stop)
            with pytest.raises(Stopped):
                prepare_files(corpus, tokenizer_info, out, shuffle_seed=5)
        with pytest.raises(UserError, match="not a folder of finished token shards"):
            open_shards(out / "train")
        assert (out / ".unshuffled/train/manifest.json").exists()
        prepare_files(corpus, tokenizer_info, out, shuffle_seed=5)
        assert contents(out) == contents(tmp_path / "whole")
        assert not (out / ".unshuffled").exists()


def test_a_stop_before_the_work_files_are_removed_leaves_none(
    corpus: str, tokenizer_info: TokenizerInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "remove", stop)
        with pytest.raises(Stopped):
            prepare_files(corpus, tokenizer_info, tmp_path / "out", shuffle_seed=5)
    before = contents(tmp_path / "out")
    prepare_files(corpus, tokenizer_info, tmp_path / "out", shuffle_seed=5)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / ".unshuffled").exists()


def _corpus_of(folder: Path, number: int, documents: int) -> TokenShards:
    """Documents of two tokens: [number, 0], [number, 1], ... in shards of 1,000 tokens."""
    tokens = np.stack([np.full(documents, number), np.arange(documents)], axis=1).astype("<u2").ravel()
    writer = ShardWriter(folder, np.dtype("<u2"), 1000)
    writer.append(tokens, np.arange(2, 2 * documents + 1, 2))
    writer.finish({"vocab_size": 65536, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 0})
    return open_shards(folder, verify="size")


def _chi_square(rows: np.ndarray, columns: np.ndarray, num_rows: int, num_columns: int) -> float:
    """Return Pearson's statistic of independence of two labels."""
    table = np.zeros((num_rows, num_columns))
    np.add.at(table, (rows, columns), 1)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def _stop_after_blocks(patch: pytest.MonkeyPatch, count: int) -> None:
    whole, left = Shuffled.blocks, [count]

    def some(self: Shuffled, place: int) -> Iterator:
        for block in whole(self, place):
            if not left[0]:
                raise Stopped
            left[0] -= 1
            yield block

    patch.setattr(Shuffled, "blocks", some)
