"""One corpus in the order in which a run reads it; the shards that it needs are fetched ahead and then released."""

from __future__ import annotations

import numpy as np

from pretrain.data.batches.order import Order
from pretrain.data.batches.samples import SampleRows, Samples


class Stream:
    """The samples of one corpus, found by their place in its order."""

    def __init__(self, samples: Samples, order: Order) -> None:
        """Read `samples` in `order`, which is over `samples.counts`."""
        self.samples = samples
        self.shards = samples.shards
        self.order = order
        self._window = range(0)
        self._needed: list[int] = []

    def read(self, places: np.ndarray, shards: np.ndarray, numbers: np.ndarray, into: SampleRows) -> None:
        """Write samples into rows.

        Args:
            places: (samples,) int64, ascending, the places in the order.
            shards: (samples,) int64, the shards that `order.at(places)` gives.
            numbers: (samples,) int64, the numbers in the shards that it gives.
            into: One row for each sample.
        """
        start = 0
        while start < len(places):
            self._go_to(int(places[start]))
            stop = int(np.searchsorted(places, self._window.stop))
            self.samples.read(shards[start:stop], numbers[start:stop], into[start:stop])
            start = stop

    def close(self) -> None:
        """Release every shard."""
        self._need([])
        self._window = range(0)

    def _go_to(self, place: int) -> None:
        if place not in self._window:
            self._window = self.order.window(place)
            self._need(self.order.needs(place))

    def _need(self, shards: list[int]) -> None:
        """Fetch these shards and release the others."""
        for shard in set(self._needed) - set(shards):
            self.shards.close(shard)
        self._needed = shards
        self.shards.fetch_ahead(shards)
