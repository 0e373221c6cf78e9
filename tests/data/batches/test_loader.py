"""Batches: the same samples in the same order whatever the ranks, and a state of one integer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pretrain.data import SampleOrder, TokenShards
from pretrain.data.batches.loader import Loader, eval_batches
from pretrain.errors import UserError

SEQ_LEN = 16
MakeShards = Callable[..., TokenShards]


@pytest.fixture
def shards(make_shards: MakeShards) -> TokenShards:
    """101 samples of 16 tokens over three shards; token i is i."""
    return make_shards(101 * SEQ_LEN + 5, shard_tokens=600)


def test_a_sample_is_a_stretch_of_text_that_overlaps_the_next_by_one(shards: TokenShards) -> None:
    seen = _rows(_global_batches(shards, ranks=1, batch=101, micro=1, steps=1))
    starts = sorted(row[0].item() for row in seen)
    assert starts == [k * SEQ_LEN for k in range(101)]
    for row in seen:
        assert torch.equal(row, torch.arange(row[0].item(), row[0].item() + SEQ_LEN + 1))


def test_batches_follow_the_order(shards: TokenShards) -> None:
    seen = _rows(_global_batches(shards, ranks=1, batch=12, micro=4, steps=20))
    order = SampleOrder(101, seed=3)
    assert [row[0].item() // SEQ_LEN for row in seen] == [order[place] for place in range(12 * 20)]


@pytest.mark.parametrize(("ranks", "micro"), [(2, 6), (2, 1), (3, 2), (4, 3), (12, 1)])
def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(
    shards: TokenShards, ranks: int, micro: int
) -> None:
    one = _global_batches(shards, ranks=1, batch=12, micro=12, steps=20)
    many = _global_batches(shards, ranks=ranks, batch=12, micro=micro, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(("before", "after"), [((1, 12), (3, 12)), ((3, 12), (2, 12)), ((2, 12), (4, 8))])
def test_a_run_goes_on_from_its_position_on_other_ranks_and_batch_sizes(
    shards: TokenShards, before: tuple[int, int], after: tuple[int, int]
) -> None:
    first = _global_batches(shards, ranks=before[0], batch=before[1], micro=1, steps=7)
    rest = _global_batches(shards, ranks=after[0], batch=after[1], micro=1, steps=9, position=7 * before[1])
    samples = [row[0].item() // SEQ_LEN for row in _rows([*first, *rest])]
    order = SampleOrder(101, seed=3)
    assert samples == [order[place] for place in range(len(samples))]


def test_micro_batches_have_the_promised_shape(shards: TokenShards) -> None:
    with closing(_loader(shards, batch=12, micro=3, rank=1, ranks=2)) as loader:
        batch = loader.next_batch()
    assert [(piece.shape, piece.dtype) for piece in batch] == [((3, SEQ_LEN + 1), torch.int64)] * 2


def test_the_position_counts_what_was_taken_and_not_what_was_read_ahead(shards: TokenShards) -> None:
    with closing(_loader(shards, batch=12, micro=12, position=36)) as loader:
        _wait_until(lambda: loader._ready.full())
        assert loader.position == 36
        loader.next_batch()
        assert loader.position == 48
        assert type(loader.position) is int


def test_an_error_while_reading_reaches_every_later_call(make_shards: MakeShards, monkeypatch) -> None:
    shards = make_shards(101 * SEQ_LEN)
    monkeypatch.setattr(shards, "read", lambda start, stop: 1 / 0)
    with closing(_loader(shards, batch=12, micro=12)) as loader:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                loader.next_batch()
        assert loader.position == 0


def test_close_ends_the_thread_at_once(shards: TokenShards) -> None:
    loader = _loader(shards, batch=12, micro=12)
    _wait_until(lambda: loader._ready.full())
    began = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - began < 1
    assert "loader" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_batch()


def test_waiting_is_counted(make_shards: MakeShards, monkeypatch) -> None:
    shards = make_shards(101 * SEQ_LEN)
    read = shards.read
    monkeypatch.setattr(shards, "read", lambda start, stop: time.sleep(0.02) or read(start, stop))
    with closing(_loader(shards, batch=10, micro=10)) as loader:
        loader.next_batch()
        assert loader.wait_s > 0.1
        _wait_until(lambda: loader._ready.full())
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
            r"global_batch_size 10 is not a multiple of data.micro_batch_size 4 x 2 data-parallel ranks = 8. Set it to 8 or 16",
        ),
        (3, 4, 2, r"Set it to 8, or"),
        (104, 1, 1, r"101 samples .* fewer than one global batch of 104"),
        (200, 1, 200, r"101 samples .* fewer than the 200 data-parallel ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    shards: TokenShards, batch: int, micro: int, ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _loader(shards, batch=batch, micro=micro, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_validation_reads_the_first_samples_in_order_on_any_ranks(shards: TokenShards, ranks: int) -> None:
    per_rank = [list(_eval(shards, batch=20, micro=2, rank=rank, ranks=ranks, batches=4)) for rank in range(ranks)]
    rows = [row for step in zip(*per_rank, strict=True) for batch in step for row in batch]
    assert [row[0].item() // SEQ_LEN for row in rows] == list(range(4 * 20))
    assert all(batch.shape == (2, SEQ_LEN + 1) for batches in per_rank for batch in batches)


def test_validation_uses_what_there_is_evenly(shards: TokenShards) -> None:
    lengths = [len(list(_eval(shards, batch=12, micro=4, rank=rank, ranks=3, batches=1000))) for rank in range(3)]
    assert lengths == [101 // 12] * 3


def test_validation_without_one_batch_is_refused_before_it_starts(shards: TokenShards) -> None:
    with pytest.raises(UserError, match=f"'{shards.folder}' hold 101 samples .* takes 102"):
        _eval(shards, batch=102, micro=51, rank=0, ranks=2, batches=1)


def test_empty_validation_shards_are_refused(tmp_path: Path, make_shards: MakeShards) -> None:
    shards = make_shards(1)
    with pytest.raises(UserError, match="hold 0 samples"):
        _eval(shards, batch=1, micro=1, rank=0, ranks=1, batches=1)


def _loader(shards: TokenShards, *, batch: int, micro: int, rank: int = 0, ranks: int = 1, position: int = 0) -> Loader:
    return Loader(
        shards,
        seq_len=SEQ_LEN,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=ranks,
        seed=3,
        position=position,
    )


def _eval(
    shards: TokenShards, *, batch: int, micro: int, rank: int, ranks: int, batches: int
) -> Iterator[torch.Tensor]:
    return eval_batches(
        shards,
        seq_len=SEQ_LEN,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=ranks,
        batches=batches,
    )


def _global_batches(
    shards: TokenShards, *, ranks: int, batch: int, micro: int, steps: int, position: int = 0
) -> list[torch.Tensor]:
    """The first `steps` global batches, each the ranks' micro-batches one after the other."""
    loaders = [
        _loader(shards, batch=batch, micro=micro, rank=rank, ranks=ranks, position=position) for rank in range(ranks)
    ]
    try:
        return [torch.cat([piece for loader in loaders for piece in loader.next_batch()]) for _ in range(steps)]
    finally:
        for loader in loaders:
            loader.close()


def _rows(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [row for batch in batches for row in batch]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
