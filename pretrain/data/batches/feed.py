"""The samples of a run, slot by slot: which source, which shard, which sample, and its tokens.

Slot p is the p-th sample that a run consumes, over all ranks. What it holds is a pure function of the corpora, the
weights and the seed, whoever asks: the loader of any rank, or a person who wants to know what a step trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.batches.mixture import Mixture
from pretrain.data.batches.samples import Rows
from pretrain.data.batches.stream import Stream


class Slots(NamedTuple):
    """Where some slots' samples are, (slots,) int64 each: the source, the place in its order, the shard, the number."""

    sources: np.ndarray
    places: np.ndarray
    shards: np.ndarray
    numbers: np.ndarray

    def part(self, rows: slice | np.ndarray) -> Slots:
        return Slots(*(column[rows] for column in self))


class Feed:
    """One or more streams, mixed."""

    def __init__(self, streams: Sequence[Stream], mixture: Mixture | None = None) -> None:
        """mixture: None for equal weights."""
        self.streams = list(streams)
        self.mixture = mixture or Mixture([1] * len(self.streams))
        samples = [stream.samples for stream in self.streams]
        (self.seq_len,) = {each.seq_len for each in samples}  # one cut of all sources: their rows stand in one batch
        (self.masked,) = {each.masked for each in samples}
        (self.carries_documents,) = {each.carries_documents for each in samples}
        self.dtype = np.result_type(*(stream.shards.dtype for stream in self.streams))
        self._reading = threading.Lock()
        self._rows = [Rows(np.empty((0, 0)))] * len(self.streams)  # memory to read into, of each source

    def at(self, slots: np.ndarray) -> Slots:
        """Where the samples of `slots` (int64) are."""
        sources, places = self.mixture.at(slots)
        if len(self.streams) == 1:
            return Slots(sources, places, *self.streams[0].order.at(places))
        shards, numbers = np.empty((2, len(slots)), dtype=np.int64)
        for source, stream in enumerate(self.streams):
            here = sources == source
            shards[here], numbers[here] = stream.order.at(places[here])
        return Slots(sources, places, shards, numbers)

    def read(self, slots: Slots, into: Rows) -> None:
        """Write the sample of each of the ascending `slots` into its row; threads take turns."""
        with self._reading:
            if len(self.streams) == 1:
                self.streams[0].read(slots.places, slots.shards, slots.numbers, into)
                return
            for source in range(len(self.streams)):
                if len(rows := np.flatnonzero(slots.sources == source)):
                    into.put(rows, self._read_source(source, slots.part(rows)))

    def close(self) -> None:
        """Let go of every shard."""
        for stream in self.streams:
            stream.close()

    def _read_source(self, source: int, slots: Slots) -> Rows:
        """The samples of one source, as narrow as its tokens are stored, until the next call."""
        stream, count = self.streams[source], len(slots.places)
        if len(self._rows[source]) < count:
            self._rows[source] = Rows.empty(
                count, self.seq_len, stream.shards.dtype, self.masked, self.carries_documents
            )
        rows = self._rows[source][:count]
        stream.read(slots.places, slots.shards, slots.numbers, rows)
        return rows
