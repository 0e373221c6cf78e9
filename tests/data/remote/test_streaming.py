"""Training on a URL: the same batches as on the folder, through a cache that holds a part of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pretrain.data import TokenShards, open_shards
from pretrain.data.batches import loader
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.loader import Loader
from pretrain.data.batches.order import WindowedOrder
from pretrain.data.batches.samples import Concatenated
from pretrain.data.batches.stream import Stream
from pretrain.data.remote.cache import CacheSettings
from pretrain.errors import UserError
from tests.support.faulty_server import FaultyServer, StorageFault

STEPS = 50
BATCH = 12


@pytest.fixture(autouse=True)
def _step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read few steps at a time: steps this small would otherwise be read some epochs at a time."""
    monkeypatch.setattr(loader, "HANDED_TOKENS", 1)


@pytest.fixture
def local(make_shards: Callable[..., TokenShards], server: FaultyServer) -> TokenShards:
    """20 shards of 62 samples each, which the server has too, with a fault in every third file."""
    shards = make_shards(20_000, shard_tokens=1000)
    for number, path in enumerate(sorted(Path(shards.location).iterdir())):
        server.objects[f"/corpus/{path.name}"] = path.read_bytes()
        if number % 3 == 0:
            kind = ("status", "cut", "flip", "reset")[number // 3 % 4]
            server.faults[f"/corpus/{path.name}"] = StorageFault(kind, times=1)
    server.faults["/corpus/manifest.json"] = StorageFault("status", status=500, times=1)
    return shards


@pytest.mark.usefixtures("impatient")
def test_a_url_gives_the_batches_of_its_folder_whatever_fails_on_the_way(
    local: TokenShards, location: str, tmp_path: Path
) -> None:
    limit = 8 * max(shard.bytes + 8 * shard.documents for shard in local.shards)  # 2 windows of 4 shards
    remote = open_shards(location, cache=CacheSettings(tmp_path / "cache", limit))
    assert remote.fingerprint == local.fingerprint
    largest = 0
    with closing(_loader(local)) as expected, closing(_loader(remote)) as found:
        for _ in range(STEPS):
            for theirs, ours in zip(expected.next_batch(), found.next_batch(), strict=True):
                assert torch.equal(theirs.inputs, ours.inputs)
                assert torch.equal(theirs.targets, ours.targets)
                assert torch.equal(theirs.positions, ours.positions)
            largest = max(largest, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*[0-9a-f]")))
    assert limit / 2 < largest <= limit


@pytest.mark.usefixtures("impatient")
def test_an_object_that_is_gone_fails_the_step_that_needs_it(
    local: TokenShards, server: FaultyServer, tmp_path: Path
) -> None:
    gone = WindowedOrder(Concatenated(local, 16).counts, 5, 4).needs(0)[4]  # the first shard of the second window
    del server.objects[f"/corpus/{local.shards[gone].file}"]
    remote = open_shards(f"{server.url}/corpus", cache=CacheSettings(tmp_path / "cache", 1 << 20))
    with closing(_loader(remote)) as batches:
        _skip(batches, 4 * 62 // BATCH)
        with pytest.raises(UserError, match=rf"{server.url}/corpus/{local.shards[gone].file} cannot be read"):
            _skip(batches, 5)


def _loader(shards: TokenShards) -> Loader:
    samples = Concatenated(shards, 16, document_attention=True)
    feed = Feed([Stream(samples, WindowedOrder(samples.counts, seed=5, window_shards=4))])
    return Loader(feed, global_batch_size=BATCH, micro_batch_size=4, rank=0, world_size=1)


def _skip(batches: Loader, steps: int) -> None:
    for _ in range(steps):
        batches.next_batch()
