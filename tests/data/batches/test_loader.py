"""Batches: the same samples in the same order whatever the ranks, and a state of one integer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pretrain.data import TokenShards
from pretrain.data.batches import loader as loader_module
from pretrain.data.batches.batch import MicroBatch
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.loader import Loader, check_enough_samples, eval_batches, slice_of_rank
from pretrain.data.batches.mixture import Mixture
from pretrain.data.batches.order import GlobalOrder, Order, WindowedOrder
from pretrain.data.batches.samples import Concatenated
from pretrain.data.batches.stream import Stream
from pretrain.errors import UserError

SEQ_LEN = 16
SAMPLES = 99
MakeShards = Callable[..., TokenShards]


@pytest.fixture
def shards(make_shards: MakeShards) -> TokenShards:
    """99 samples of 16 tokens in three shards of 602, 602 and 413 tokens; token i of them all is i."""
    return make_shards(602 + 602 + 413, shard_tokens=600)


@pytest.fixture(params=[1, 200, 1 << 20])
def handed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps pass from the reading thread one by one, a few at a time, and whole epochs at a time."""
    monkeypatch.setattr(loader_module, "HANDED_TOKENS", request.param)


def test_a_sample_is_a_stretch_of_one_shard_that_overlaps_the_next_by_one(shards: TokenShards) -> None:
    seen = _rows(_global_batches(_feed(shards), ranks=1, batch=SAMPLES, micro=SAMPLES, steps=1))
    assert sorted(row[0].item() for row in seen) == sorted(_starts(shards))
    for row in seen:
        assert torch.equal(row, torch.arange(row[0].item(), row[0].item() + SEQ_LEN + 1))


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("window", [0, 1, 2])
def test_batches_follow_the_order(shards: TokenShards, window: int) -> None:
    seen = _rows(_global_batches(_feed(shards, window), ranks=1, batch=12, micro=4, steps=20))
    assert [row[0].item() for row in seen] == _expected(shards, window, 12 * 20)


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 6), (2, 1), (3, 2), (8, 3), (24, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(
    shards: TokenShards, ranks: int, micro: int, window: int
) -> None:
    one = _global_batches(_feed(shards, window), ranks=1, batch=24, micro=24, steps=20)
    many = _global_batches(_feed(shards, window), ranks=ranks, batch=24, micro=micro, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_the_slices_of_all_ranks_are_the_global_batch_in_order(ranks: int) -> None:
    assert [sample for rank in range(ranks) for sample in slice_of_rank(4096, rank, ranks)] == list(range(4096))


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize(("before", "after"), [((1, 12), (3, 12)), ((3, 12), (2, 12)), ((2, 12), (8, 8))])
def test_a_run_goes_on_from_its_position_on_other_ranks_and_batch_sizes(
    shards: TokenShards, before: tuple[int, int], after: tuple[int, int], window: int
) -> None:
    feed = _feed(shards, window)
    first = _global_batches(feed, ranks=before[0], batch=before[1], micro=1, steps=7)
    rest = _global_batches(feed, ranks=after[0], batch=after[1], micro=1, steps=19, position=7 * before[1])
    seen = [row[0].item() for row in _rows([*first, *rest])]
    assert seen == _expected(shards, window, len(seen))


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize(("ranks", "micro", "position"), [(1, 12, 0), (3, 2, 0), (2, 3, 600)])
def test_a_mixture_reads_each_source_in_its_own_order(
    tmp_path: Path, make_shards: MakeShards, ranks: int, micro: int, position: int
) -> None:
    small = make_shards(1000, shard_tokens=300)
    large = make_shards(70_000 + 3000, shard_tokens=80_000, dtype="<u4", folder="large")
    feed = Feed([_stream(small, 0), _stream(large, 2)], Mixture([0.7, 0.3]))
    seen = _rows(_global_batches(feed, ranks=ranks, batch=12, micro=micro, steps=30, position=position))
    wide = [row[-1] - row[0] == SEQ_LEN and row[0] >= 0 for row in seen]
    assert all(wide)
    sources, places = feed.mixture.at(torch.arange(position, position + 360).numpy())
    for source, shards, window in ((0, small, 0), (1, large, 2)):
        mine = [row[0].item() for row, of in zip(seen, sources.tolist(), strict=True) if of == source]
        first, last = places[sources == source][[0, -1]].tolist()
        assert mine == _expected(shards, window, last + 1)[first:]
        assert len(mine) == {0: 252, 1: 108}[source]


@pytest.mark.usefixtures("handed")
@pytest.mark.parametrize("within_documents", [False, True])
def test_a_source_of_which_a_rank_has_no_sample_for_many_steps_changes_nothing(
    make_shards: MakeShards, within_documents: bool
) -> None:
    corpora = [make_shards(3000, shard_tokens=700, folder=name) for name in ("often", "seldom")]
    streams = [
        Stream(samples, GlobalOrder(samples.counts, 3))
        for samples in (Concatenated(shards, SEQ_LEN, within_documents) for shards in corpora)
    ]
    feed = Feed(streams, Mixture([0.95, 0.05]))
    one = _global_batches(feed, ranks=1, batch=8, micro=8, steps=30)
    eight = _global_batches(feed, ranks=8, batch=8, micro=1, steps=30)
    assert all(torch.equal(a, b) for a, b in zip(one, eight, strict=True))


@pytest.mark.parametrize("window", [0, 1])
def test_loaders_that_share_a_feed_read_what_each_would_alone(shards: TokenShards, window: int) -> None:
    feed = Feed([_stream(shards, window), _stream(shards, 0)], Mixture([2, 1]))
    alone = _global_batches(feed, ranks=3, batch=12, micro=4, steps=150)
    loaders = [_loader(feed, batch=12, micro=4, rank=rank, ranks=3) for rank in range(3)]
    together = [torch.cat([loader.next_batch()[0].to("cpu").tokens for loader in loaders]) for _ in range(150)]
    for loader in loaders:
        loader.close()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_batches_that_are_kept_keep_what_they_hold(shards: TokenShards, handed: None) -> None:
    feed = _feed(shards)
    with closing(_loader(feed, batch=12, micro=3)) as loader:
        kept = [micro for _ in range(60) for micro in loader.next_batch()]
    assert [row[0].item() for batch in kept for row in batch.tokens] == _expected(shards, 0, 60 * 12)


def test_memory_of_batches_that_are_gone_is_used_again(shards: TokenShards, monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "HANDED_TOKENS", 1)
    places = set()
    with closing(_loader(_feed(shards), batch=12, micro=12)) as loader:
        for _ in range(100):
            places.add(loader.next_batch()[0].tokens.data_ptr())
    assert len(places) <= loader_module.HANDED_AHEAD + 3


def test_micro_batches_have_the_promised_shape(shards: TokenShards) -> None:
    with closing(_loader(_feed(shards), batch=12, micro=3, rank=1, ranks=2)) as loader:
        batches = [batch.to("cpu") for batch in loader.next_batch()]
    assert [(batch.tokens.shape, batch.tokens.dtype) for batch in batches] == [((3, SEQ_LEN + 1), torch.int64)] * 2
    for batch in batches:
        assert torch.equal(batch.inputs, batch.tokens[:, :-1])
        assert torch.equal(batch.targets, batch.tokens[:, 1:])
        assert batch.counted is batch.positions is None


def test_batches_are_as_narrow_as_the_shards_until_they_are_moved(make_shards: MakeShards) -> None:
    for dtype, stored in (("<u2", torch.uint16), ("<u4", torch.uint32)):
        with closing(_loader(_feed(make_shards(5000, dtype=dtype, folder=dtype[1:])), batch=12, micro=3)) as loader:
            (batch, *_) = loader.next_batch()
        assert batch.tokens.dtype == stored
        assert batch.inputs.dtype == batch.targets.dtype == batch.to("cpu").tokens.dtype == torch.int64


def test_large_ids_arrive_as_they_are(make_shards: MakeShards) -> None:
    shards = make_shards(1000, dtype="<u4", first=2**31 - 500)
    with closing(_loader(_feed(shards), batch=12, micro=12)) as loader:
        batch = loader.next_batch()[0]
    steps = batch.targets - batch.inputs
    assert (steps == 1).all()
    assert batch.inputs.min() >= 2**31 - 500
    assert batch.inputs.max() > 2**31


def test_document_attention_comes_with_every_batch(make_shards: MakeShards, handed: None) -> None:
    shards = make_shards(2000, shard_tokens=700, document_tokens=11)
    samples = Concatenated(shards, SEQ_LEN, document_attention=True)
    feed = Feed([Stream(samples, GlobalOrder(samples.counts, 3)), Stream(samples, GlobalOrder(samples.counts, 4))])
    with closing(_loader(feed, batch=12, micro=4)) as loader:
        for batch in [micro.to("cpu") for _ in range(20) for micro in loader.next_batch()]:
            # Token i is i, and a document begins at every 11th token: at those of a shard and no others.
            since = batch.inputs % 11
            begun = batch.inputs[:, :1] % 11
            first = torch.arange(SEQ_LEN) - since < 0  # the document that the sample begins in the midst of
            assert torch.equal(batch.positions, torch.where(first, since - begun, since))
            assert torch.equal(batch.counted, since != 10)
            assert torch.equal(batch.targets, torch.where(since != 10, batch.inputs + 1, -100))


def test_the_position_counts_what_was_taken_and_not_what_was_read_ahead(shards: TokenShards) -> None:
    with closing(_loader(_feed(shards), batch=12, micro=12, position=36)) as loader:
        _wait_until(lambda: loader._handed.full())
        assert loader.position == 36
        loader.next_batch()
        assert loader.position == 48
        assert type(loader.position) is int


@pytest.mark.usefixtures("handed")
def test_an_error_while_reading_is_raised_when_its_step_is_due_and_at_every_later_call(
    shards: TokenShards, monkeypatch
) -> None:
    open_tokens, order = shards.open_tokens, _order(shards, 1)
    broken = order.needs(0)[1]  # the shard of the second window
    monkeypatch.setattr(shards, "open_tokens", lambda shard: 1 / 0 if shard == broken else open_tokens(shard))
    good = order.window(0).stop // 5
    with closing(_loader(_feed(shards, 1), batch=5, micro=5)) as loader:
        seen = [row[0].item() for _ in range(good) for row in loader.next_batch()[0].tokens]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                loader.next_batch()
        assert loader.position == 5 * good
    assert seen == _expected(shards, 1, 5 * good)


def test_a_token_beyond_the_vocabulary_is_reported_by_file_and_offset(shards: TokenShards) -> None:
    samples = Concatenated(shards, SEQ_LEN, vocab_size=1000)  # shard 1 begins with token 602, so 1000 is its token 398
    feed = Feed([Stream(samples, WindowedOrder(samples.counts, 3, 3))])
    found = rf"of shard_0000[12].bin in '{shards.location}' is 1,\d\d\d, and the vocabulary has 1,000 entries"
    with closing(_loader(feed, batch=99, micro=99)) as loader, pytest.raises(UserError, match=found) as error:
        loader.next_batch()
    words = str(error.value).replace(",", "").split()
    offset, file, token = int(words[1]), words[3], int(words[7])
    assert offset + {"shard_00001.bin": 602, "shard_00002.bin": 1204}[file] == token


def test_close_ends_the_thread_at_once(shards: TokenShards) -> None:
    loader = _loader(_feed(shards), batch=12, micro=12)
    _wait_until(lambda: loader._handed.full())
    began = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - began < 1
    assert "loader" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_batch()


def test_waiting_is_counted(shards: TokenShards, monkeypatch) -> None:
    open_tokens = shards.open_tokens
    monkeypatch.setattr(shards, "open_tokens", lambda shard: time.sleep(0.05) or open_tokens(shard))
    with closing(_loader(_feed(shards), batch=99, micro=99)) as loader:
        loader.next_batch()
        assert loader.wait_s > 0.1  # three shards
        _wait_until(lambda: loader._handed.full())
        waited = loader.wait_s
        loader.next_batch()
        assert loader.wait_s - waited < 0.1


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "message"),
    [
        (
            10,
            4,
            2,
            r"global_batch_size 10 is not a multiple of data.micro_batch_size 4 x 2 data-parallel ranks = 8. Set it to 8 or 16, "
            r"or data.micro_batch_size to 5, the nearest that fits",
        ),
        (3, 4, 2, r"Set it to 8, or start 1 data-parallel ranks, .* with data.micro_batch_size 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    shards: TokenShards, batch: int, micro: int, ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _loader(_feed(shards), batch=batch, micro=micro, ranks=ranks)


@pytest.mark.parametrize(
    ("batch", "ranks", "message"),
    [
        (104, 1, r"99 samples .* fewer than one global batch of 104"),
        (200, 200, r"99 samples .* fewer than the 200 data-parallel ranks"),
    ],
)
def test_too_few_samples_are_refused(shards: TokenShards, batch: int, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_enough_samples(Concatenated(shards, SEQ_LEN), batch, ranks)
    check_enough_samples(Concatenated(shards, SEQ_LEN), 99, 99)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_validation_reads_the_first_samples_in_order_on_any_ranks(shards: TokenShards, ranks: int) -> None:
    per_rank = [list(_eval(shards, batch=20, micro=2, rank=rank, ranks=ranks, batches=4)) for rank in range(ranks)]
    rows = [row for step in zip(*per_rank, strict=True) for batch in step for row in batch.tokens]
    assert [row[0].item() for row in rows] == _starts(shards)[: 4 * 20]
    assert all(batch.tokens.shape == (2, SEQ_LEN + 1) for batches in per_rank for batch in batches)


def test_validation_uses_what_there_is_evenly(shards: TokenShards) -> None:
    lengths = [len(list(_eval(shards, batch=12, micro=4, rank=rank, ranks=3, batches=1000))) for rank in range(3)]
    assert lengths == [99 // 12] * 3


def test_validation_without_one_batch_is_refused_before_it_starts(shards: TokenShards) -> None:
    with pytest.raises(UserError, match=f"'{shards.location}' hold 99 samples .* takes 102"):
        _eval(shards, batch=102, micro=51, rank=0, ranks=2, batches=1)


def test_validation_shards_without_a_sample_are_refused(make_shards: MakeShards) -> None:
    with pytest.raises(UserError, match="hold 0 samples"):
        _eval(make_shards(16), batch=1, micro=1, rank=0, ranks=1, batches=1)


def _starts(shards: TokenShards) -> list[int]:
    """The first token of every sample, in file order, where token i of the corpus is i."""
    starts, before = [], 0
    for shard in shards.shards:
        starts += range(before, before + shard.tokens - SEQ_LEN, SEQ_LEN)
        before += shard.tokens
    return starts


def _expected(shards: TokenShards, window: int, count: int) -> list[int]:
    """Return the first tokens of the run's first samples."""
    at, numbers = _order(shards, window).at(torch.arange(count).numpy())
    befores = [sum(shard.tokens for shard in shards.shards[:each]) for each in range(len(shards.shards))]
    return [befores[shard] + SEQ_LEN * number for shard, number in zip(at.tolist(), numbers.tolist(), strict=True)]


def _order(shards: TokenShards, window: int) -> Order:
    """Return a global order for window 0, else a windowed one."""
    counts = Concatenated(shards, SEQ_LEN).counts
    return WindowedOrder(counts, 3, window) if window else GlobalOrder(counts, 3)


def _stream(shards: TokenShards, window: int) -> Stream:
    return Stream(Concatenated(shards, SEQ_LEN), _order(shards, window))


def _feed(shards: TokenShards, window: int = 0) -> Feed:
    return Feed([_stream(shards, window)])


def _loader(feed: Feed, *, batch: int, micro: int, rank: int = 0, ranks: int = 1, position: int = 0) -> Loader:
    return Loader(feed, global_batch_size=batch, micro_batch_size=micro, rank=rank, world_size=ranks, position=position)


def _eval(shards: TokenShards, *, batch: int, micro: int, rank: int, ranks: int, batches: int) -> Iterator[MicroBatch]:
    return eval_batches(
        Concatenated(shards, SEQ_LEN),
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=ranks,
        batches=batches,
    )


def _global_batches(
    feed: Feed, *, ranks: int, batch: int, micro: int, steps: int, position: int = 0
) -> list[torch.Tensor]:
    """The first `steps` global batches, each the tokens of the ranks' micro-batches one after the other."""
    by_rank = []
    for rank in range(ranks):
        with closing(_loader(feed, batch=batch, micro=micro, rank=rank, ranks=ranks, position=position)) as loader:
            by_rank.append([[piece.to("cpu").tokens for piece in loader.next_batch()] for _ in range(steps)])
    return [torch.cat([piece for pieces in step for piece in pieces]) for step in zip(*by_rank, strict=True)]


def _rows(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [row for batch in batches for row in batch]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
