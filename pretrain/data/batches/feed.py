"""The samples of a run, slot by slot: which source, which shard, which sample, and its tokens.

Slot p is the p-th sample that a run consumes, over all ranks. Its content is a pure function of the corpora, the weights
and the seed: the same for the loader of every rank, and for a person who asks what a step trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.batches.mixture import Mixture
from pretrain.data.batches.samples import SampleRows
from pretrain.data.batches.stream import Stream


class Slots(NamedTuple):
    """The samples of some slots, (slots,) int64 each: the source, the place in its order, the shard, the number in it."""

    sources: np.ndarray
    places: np.ndarray
    shards: np.ndarray
    numbers: np.ndarray

    def part(self, rows: slice | np.ndarray) -> Slots:
        """Return some of the slots."""
        return Slots(*(column[rows] for column in self))


class Feed:
    """One or more streams, mixed. They have one length of sample and one treatment of documents."""

    def __init__(self, streams: Sequence[Stream], mixture: Mixture | None = None) -> None:
        """Mix `streams` as `mixture` says; with equal weights if it is None."""
        self.streams = list(streams)
        self.mixture = mixture or Mixture([1] * len(self.streams))
        samples = [stream.samples for stream in self.streams]
        (self.seq_len,) = {each.seq_len for each in samples}  # one cut of all sources: their rows stand in one batch
        (self.masked,) = {each.masked for each in samples}
        (self.carries_documents,) = {each.carries_documents for each in samples}
        self.dtype = np.result_type(*(stream.shards.dtype for stream in self.streams))
        self._reading = threading.Lock()
        self._rows = [SampleRows(np.empty((0, 0)))] * len(self.streams)  # memory to read into, of each source

    def at(self, slots: np.ndarray) -> Slots:
        """Return the samples of `slots`, (slots,) int64."""
        sources, places = self.mixture.at(slots)
        if len(self.streams) == 1:
            return Slots(sources, places, *self.streams[0].order.at(places))
        shards, numbers = np.empty((2, len(slots)), dtype=np.int64)
        for source, stream in enumerate(self.streams):
            here = sources == source
            shards[here], numbers[here] = stream.order.at(places[here])
        return Slots(sources, places, shards, numbers)

    def read(self, slots: Slots, into: SampleRows) -> None:
        """Write the sample of each of the ascending `slots` into its row of `into`; threads take turns."""
        with self._reading:
            if len(self.streams) == 1:
                self.streams[0].read(slots.places, slots.shards, slots.numbers, into)
                return
            for source in range(len(self.streams)):
                if len(rows := np.flatnonzero(slots.sources == source)):
                    into.put(rows, self._read_source(source, slots.part(rows)))

    def close(self) -> None:
        """Release every shard."""
        for stream in self.streams:
            stream.close()

    def _read_source(self, source: int, slots: Slots) -> SampleRows:
        """Return the samples of one source, as narrow as its tokens are stored; they are valid until the next call."""
        stream, count = self.streams[source], len(slots.places)
        if len(self._rows[source]) < count:
            self._rows[source] = SampleRows.empty(
                count, self.seq_len, stream.shards.dtype, self.masked, self.carries_documents
            )
        rows = self._rows[source][:count]
        stream.read(slots.places, slots.shards, slots.numbers, rows)
        return rows
