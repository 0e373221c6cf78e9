"""A stream: the samples of its shards, few shards at a time, whatever the corpus's size."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import TokenShards
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.loader import Loader
from pretrain.data.batches.order import FileOrder, GlobalOrder, WindowedOrder
from pretrain.data.batches.samples import Concatenated, SampleRows
from pretrain.data.batches.stream import Stream
from pretrain.data.tokens.corpus import Shard
from pretrain.data.tokens.corpus_files import LocalFiles
from pretrain.errors import UserError

SEQ_LEN = 16
MakeShards = Callable[..., TokenShards]


class Watched(TokenShards):
    """Token i of shard s is 1000 s + i; notes which shards are open, and which were asked for."""

    def __init__(self, lengths: Sequence[int]) -> None:
        shards = [Shard(f"{number}", length, 1, 4 * length) for number, length in enumerate(lengths)]
        super().__init__("nowhere", LocalFiles(Path("nowhere")), shards, np.dtype("<u4"), "fingerprint")
        self.open: set[int] = set()
        self.fetched: list[list[int]] = []
        self.most = 0

    def open_tokens(self, shard: int) -> np.ndarray:
        self.open.add(shard)
        self.most = max(self.most, len(self.open))
        return np.arange(1000 * shard, 1000 * shard + self.shards[shard].tokens, dtype="<u4")

    def close(self, shard: int) -> None:
        self.open.discard(shard)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        self.fetched.append(list(shards))


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda lengths: max(lengths) > SEQ_LEN),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    at_once=st.integers(1, 50),
)
def test_a_windowed_stream_holds_two_windows_and_asks_for_the_next_one_in_time(
    lengths: list[int], window: int, seed: int, at_once: int
) -> None:
    shards = Watched(lengths)
    samples = Concatenated(shards, SEQ_LEN)
    order = WindowedOrder(samples.counts, seed, window)
    stream = Stream(samples, order)
    for place in range(0, 3 * order.num_samples, at_once):
        places = np.arange(place, place + at_once)
        rows = SampleRows.empty(at_once, SEQ_LEN, shards.dtype, masked=False, carries_documents=False)
        at, numbers = order.at(places)
        stream.read(places, at, numbers, rows)
        assert (rows.tokens == (1000 * at + SEQ_LEN * numbers)[:, None] + np.arange(SEQ_LEN + 1)).all()
        assert shards.fetched[-1] == order.needs(place + at_once - 1)
        assert shards.open <= set(shards.fetched[-1])
    assert shards.most <= 2 * window
    stream.close()
    assert not shards.open


def test_a_stream_goes_back_to_where_it_is_asked_to(make_shards: MakeShards) -> None:
    shards = make_shards(5000, shard_tokens=600)
    samples = Concatenated(shards, SEQ_LEN)
    stream = Stream(samples, WindowedOrder(samples.counts, 1, 2))
    first, again = (_read(stream, np.arange(0, 100)) for _ in range(2))
    assert np.array_equal(first, again)


def test_samples_of_many_shards_come_in_the_order_asked_for(make_shards: MakeShards) -> None:
    shards = make_shards(6000, shard_tokens=100)
    samples = Concatenated(shards, SEQ_LEN)
    order = GlobalOrder(samples.counts, 1)
    befores = np.cumsum([0, *(shard.tokens for shard in shards.shards)])
    at, numbers = order.at(np.arange(800))
    expected = (befores[at] + SEQ_LEN * numbers)[:, None] + np.arange(SEQ_LEN + 1)
    assert np.array_equal(_read(Stream(samples, order), np.arange(800)), expected)


def test_a_sample_that_a_shard_does_not_have_is_refused(make_shards: MakeShards) -> None:
    samples = Concatenated(make_shards(3000, shard_tokens=500), SEQ_LEN)
    rows = SampleRows.empty(2, SEQ_LEN, samples.shards.dtype, masked=False, carries_documents=False)
    samples.read(np.array([0, 1]), samples.counts[:2] - 1, rows)
    with pytest.raises(IndexError, match="has no samples"):
        samples.read(np.array([0, 1]), samples.counts[:2] - [1, 0], rows)


def test_no_token_of_a_shard_but_the_rest_is_left_out(make_shards: MakeShards) -> None:
    shards = make_shards(3000, shard_tokens=500)
    samples = Concatenated(shards, SEQ_LEN)
    targets = _read(Stream(samples, FileOrder(samples.counts)), np.arange(samples.counts.sum()))[:, 1:].ravel().tolist()
    expected, before = [], 0
    for shard in shards.shards:
        whole = (shard.tokens - 1) // SEQ_LEN * SEQ_LEN
        expected += range(before + 1, before + 1 + whole)
        before += shard.tokens
    assert targets == expected


@given(ends=st.lists(st.integers(1, 200), min_size=1, max_size=30, unique=True).map(sorted))
def test_the_documents_of_a_sample_are_those_of_its_inputs(ends: list[int]) -> None:
    shards = Watched([ends[-1]])
    shards.open_ends = lambda shard: np.array(ends, dtype="<u8")
    samples = Concatenated(shards, SEQ_LEN)
    document_of = [sum(end <= token for end in ends) for token in range(ends[-1])]
    for number in range(int(samples.counts[0])):
        found = [
            (document, token) for document, start, stop in samples.documents(0, number) for token in range(start, stop)
        ]
        inputs = range(number * SEQ_LEN, (number + 1) * SEQ_LEN)
        assert found == [(document_of[token], token) for token in inputs]


def test_a_shard_that_was_cut_while_in_use_is_reported_when_its_sample_is_due(make_shards: MakeShards) -> None:
    shards = make_shards(5000, shard_tokens=600)
    os.truncate(Path(shards.location) / "shard_00003.bin", 1000)
    samples = Concatenated(shards, SEQ_LEN)
    feed = Feed([Stream(samples, FileOrder(samples.counts))])
    with closing(Loader(feed, global_batch_size=37, micro_batch_size=37, rank=0, world_size=1)) as loader:
        for _ in range(3):
            loader.next_batch()
        with pytest.raises(UserError, match=r"shard_00003\.bin ends at byte 1000"):
            loader.next_batch()


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("position", [0, 10**9])
def test_ten_billion_samples_cost_no_more_memory_than_their_shards(tmp_path: Path, window: int, position: int) -> None:
    seq_len, count = 2, 10  # shards, each 4 GB that are not on the disk
    tokens = 10**9 * seq_len + 1
    with open(tmp_path / "hole.bin", "wb") as file:
        file.truncate(2 * tokens)
    shards = [Shard("hole.bin", tokens, 1, 2 * tokens) for _ in range(count)]
    corpus = TokenShards(str(tmp_path), LocalFiles(tmp_path), shards, np.dtype("<u2"), "fingerprint")
    tracemalloc.start()
    samples = Concatenated(corpus, seq_len)
    order = WindowedOrder(samples.counts, 1, window) if window else GlobalOrder(samples.counts, 1)
    loader = Loader(
        Feed([Stream(samples, order)]),
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        position=position,
    )
    with closing(loader):
        batch = loader.next_batch()[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples.counts.sum() == 10**10
    assert batch.tokens.shape == (8, seq_len + 1)
    assert peak < 50e6  # a byte a sample would be 10 GB


def _read(stream: Stream, places: np.ndarray) -> np.ndarray:
    rows = SampleRows.empty(len(places), SEQ_LEN, np.dtype(np.int64), masked=False, carries_documents=False)
    stream.read(places, *stream.order.at(places), rows)
    return rows.tokens
