"""Best-fit packing against best-fit-decreasing as textbooks have it, and every token of real shards counted."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.batches.best_fit import best_fit_decreasing, cut_into_pieces
from pretrain.data.batches.packing import BestFit, Plans
from pretrain.data.batches.samples import SampleRows
from pretrain.data.tokens import ShardWriter, TokenShards, open_shards
from pretrain.errors import UserError

SEQ_LEN, EOS = 32, 9


def textbook_best_fit(lengths: list[int], capacity: int) -> Counter:
    """Return the room left in each bin: one piece after another, the longest first, over all bins."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [bin_ for bin_, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits, key=lambda bin_: room[bin_])] -= length
        else:
            room.append(capacity - length)
    return Counter(room)


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=150))))
def test_bins_are_as_full_as_those_of_the_textbook(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    room = capacity - np.bincount(bins, weights=lengths) if lengths else []
    assert Counter(int(left) for left in room) == textbook_best_fit(lengths, capacity)
    assert list(dict.fromkeys(bins.tolist())) == list(range(len(room)))


def test_many_documents_of_real_proportions_fill_samples_as_the_textbook_does() -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 1.0, 3000).astype(np.int64).clip(2, 257)
    bins = best_fit_decreasing(lengths, 257)
    assert Counter((257 - np.bincount(bins, weights=lengths)).astype(int).tolist()) == textbook_best_fit(lengths, 257)
    assert lengths.sum() / (257 * (bins.max() + 1)) > 0.998


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(2, 12))
def test_pieces_hold_each_token_once_as_a_target_and_cut_only_what_is_too_long(
    lengths: list[int], capacity: int
) -> None:
    ends = np.cumsum(lengths).astype(np.uint64)
    starts, pieces = cut_into_pieces(ends, capacity)
    assert pieces.max(initial=2) <= capacity
    assert pieces.min(initial=2) >= 2
    targets = [token for start, piece in zip(starts, pieces, strict=True) for token in range(start + 1, start + piece)]
    first_tokens = {0, *ends[:-1].tolist()}
    assert targets == [token for token in range(sum(lengths)) if token not in first_tokens]
    whole = {(start, length) for start, length in zip([0, *ends.tolist()], lengths, strict=False) if length > 1}
    assert {piece for piece in whole if piece[1] <= capacity} <= set(zip(starts.tolist(), pieces.tolist(), strict=True))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """About 20 shards; token i of the corpus has id i. Documents of 1 to 100 tokens, also of exactly 33."""
    folder = tmp_path_factory.mktemp("packing") / "shards"
    lengths = np.random.default_rng(1).lognormal(2.5, 1.0, 2000).astype(np.int64).clip(1, 100)
    lengths[::50] = SEQ_LEN + 1
    writer = ShardWriter(folder, np.dtype("<u4"), 2000)
    writer.append(np.arange(lengths.sum()).astype("<u4"), np.cumsum(lengths))
    description = {"vocab_size": 1 << 20, "eos_id": EOS, "tokenizer_fingerprint": "abc", "text_bytes": 1}
    writer.finish(description)
    return open_shards(folder)


def read(samples: BestFit, shard: int, numbers: np.ndarray) -> SampleRows:
    rows = SampleRows(
        np.full((len(numbers), SEQ_LEN + 1), -7, dtype=np.int64),
        np.ones((len(numbers), SEQ_LEN), dtype=bool),
        np.full((len(numbers), SEQ_LEN), -7, dtype=np.int64) if samples.carries_documents else None,
    )
    samples.read(np.full(len(numbers), shard), numbers, rows)
    return rows


def plans_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def test_each_token_but_the_first_of_a_document_is_the_target_of_one_place(shards, tmp_path: Path) -> None:
    samples = BestFit(shards, SEQ_LEN, tmp_path)
    begins, targets, places, first_of_shard = set(), [], 0, 0
    for shard, entry in enumerate(shards.shards):
        ends = [first_of_shard + int(end) for end in shards.open_ends(shard)]
        begins |= {first_of_shard, *ends[:-1]}
        rows = read(samples, shard, np.arange(samples.counts[shard]))
        inputs, following = rows.tokens[:, :-1], rows.tokens[:, 1:]
        targets += following[rows.counted].tolist()
        assert (following[rows.counted] == inputs[rows.counted] + 1).all()
        places += rows.counted.size
        first_of_shard += entry.tokens
    assert sorted(targets) == [token for token in range(shards.tokens) if token not in begins]
    assert samples.utilization == len(targets) / places
    assert samples.utilization > 0.85


def test_a_token_beyond_the_vocabulary_is_reported_by_file_and_offset(shards, tmp_path: Path) -> None:
    bad = sum(shard.tokens for shard in shards.shards[:3]) + 100  # id and place in the corpus are one number here
    samples = BestFit(shards, SEQ_LEN, tmp_path, vocab_size=bad)
    read(samples, 2, np.arange(samples.counts[2]))
    with pytest.raises(UserError) as refused:
        read(samples, 3, np.arange(samples.counts[3]))
    named = re.match(r"token ([\d,]+) of shard_00003.bin in .* is ([\d,]+), and the vocabulary", str(refused.value))
    place, found = (int(number.replace(",", "")) for number in named.groups())
    assert place + bad - 100 == found >= bad


def test_positions_begin_anew_with_each_document_and_padding(shards, tmp_path: Path) -> None:
    samples = BestFit(shards, SEQ_LEN, tmp_path, document_attention=True)
    rows = read(samples, 3, np.arange(samples.counts[3]))
    padded = 0
    for number, (tokens, counted, positions) in enumerate(zip(rows.tokens, rows.counted, rows.positions, strict=True)):
        lengths = [stop - first for _, first, stop in samples.documents(3, number)]
        rest = SEQ_LEN - sum(lengths)
        padded += rest > 0
        expected = [place for length in (*lengths, rest) for place in range(length)]
        assert positions.tolist() == expected
        ends = np.cumsum(lengths) - 1
        last_is_target_too = sum(lengths) == SEQ_LEN and tokens[-1] == tokens[-2] + 1
        uncounted = {*ends.tolist(), *range(sum(lengths), SEQ_LEN)} - ({SEQ_LEN - 1} if last_is_target_too else set())
        assert set(np.flatnonzero(~counted)) == uncounted
    assert padded


def test_documents_are_named_by_number_and_tokens(shards, tmp_path: Path) -> None:
    samples = BestFit(shards, SEQ_LEN, tmp_path)
    ends = shards.open_ends(2).astype(int).tolist()
    starts = [0, *ends[:-1]]
    tokens = shards.open_tokens(2)
    for number in range(samples.counts[2]):
        inputs = read(samples, 2, np.array([number])).tokens[0, :-1]
        found = samples.documents(2, number)
        joined = np.concatenate([tokens[first:stop] for _, first, stop in found])
        assert (inputs[: len(joined)] == joined).all()
        for document, first, stop in found:
            assert starts[document] <= first < stop <= ends[document]
            if ends[document] - starts[document] <= SEQ_LEN:
                assert first == starts[document]
                assert stop == ends[document] or (stop == ends[document] - 1 and document == found[-1][0])


def test_rows_come_in_the_order_asked_for_from_several_shards(shards, tmp_path: Path) -> None:
    samples = BestFit(shards, SEQ_LEN, tmp_path)
    found = SampleRows(np.empty((3, SEQ_LEN + 1), dtype=np.uint32), np.empty((3, SEQ_LEN), dtype=bool))
    samples.read(np.array([1, 7, 1]), np.array([5, 0, 2]), found)
    for row, (shard, number) in enumerate([(1, 5), (7, 0), (1, 2)]):
        alone = read(samples, shard, np.array([number]))
        assert (found.tokens[row] == alone.tokens[0]).all()
        assert (found.counted[row] == alone.counted[0]).all()


def test_a_run_that_starts_again_makes_no_plan(shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BestFit(shards, SEQ_LEN, tmp_path)
    made = plans_in(tmp_path)
    assert len(made) == len(shards.shards)
    monkeypatch.setattr(Plans, "_make", None)
    again = BestFit(shards, SEQ_LEN, tmp_path)
    assert (again.counts == first.counts).all()
    assert (read(again, 0, np.arange(4)).tokens == read(first, 0, np.arange(4)).tokens).all()


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "empty", "gone"])
def test_a_damaged_plan_is_made_anew(shards, tmp_path: Path, damage: str) -> None:
    expected = read(BestFit(shards, SEQ_LEN, tmp_path), 4, np.arange(6)).tokens
    made = plans_in(tmp_path)
    samples = BestFit(shards, SEQ_LEN, tmp_path)
    path = next(tmp_path.rglob("000004_*.npy"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped bit": bytes(content), "cut": bytes(content[:-40]), "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert (read(samples, 4, np.arange(6)).tokens == expected).all()
    assert plans_in(tmp_path) == made


def test_plans_belong_to_one_corpus_and_one_length(shards, tmp_path: Path) -> None:
    BestFit(shards, SEQ_LEN, tmp_path)
    BestFit(shards, SEQ_LEN + 1, tmp_path)
    assert len(plans_in(tmp_path)) == 2 * len(shards.shards)


def _make_and_read(shards: TokenShards, folder: Path, results) -> None:
    samples = BestFit(shards, SEQ_LEN, folder)
    results.put((samples.counts.tolist(), read(samples, 5, np.arange(3)).tokens.tolist()))


def test_two_processes_that_start_at_once_agree(shards, tmp_path: Path) -> None:
    """They share the making of plans; a plan that both make is the same."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_make_and_read, args=(shards, tmp_path / "both", results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    alone = BestFit(shards, SEQ_LEN, tmp_path / "alone")
    assert found == [(alone.counts.tolist(), read(alone, 5, np.arange(3)).tokens.tolist())] * 2
    assert plans_in(tmp_path / "both") == plans_in(tmp_path / "alone")
    assert not list(tmp_path.rglob(".*"))


def test_boundaries_that_descend_are_refused_by_name(shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards.location, tmp_path / "shards"))
    ends = np.fromfile(folder / "shard_00002.ends", dtype="<u8")
    ends[[1, 2]] = ends[[2, 1]]
    ends.tofile(folder / "shard_00002.ends")
    damaged = open_shards(folder, verify="size")
    with pytest.raises(UserError, match=rf"shard_00002\.ends says that document 2 ends at token {ends[2]}, not after"):
        BestFit(damaged, SEQ_LEN, tmp_path / "plans")


def test_a_folder_that_takes_no_plans_is_named(shards, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"cannot keep plans of packed documents in {tmp_path}/file.*data.cache.folder"
    ):
        BestFit(shards, SEQ_LEN, tmp_path / "file")
