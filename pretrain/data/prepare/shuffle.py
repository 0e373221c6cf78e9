"""The second pass of a shuffled preparation: the documents of prepared folders, written in an order that is computed.

The order is a keyed permutation of the documents' numbers, so it takes no memory, and the state of the pass is the number
of documents written. They are gathered block by block: a block is read in the order in which its documents lie on disk,
and written in the permuted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretrain.data.batches.order import SampleOrder
from pretrain.data.prepare.journal import Journal, splits_of, written
from pretrain.data.prepare.parts import joined_manifest
from pretrain.data.progress import Progress
from pretrain.data.tokens.shards import TokenShards, open_shards
from pretrain.data.tokens.writer import ShardWriter

BLOCK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 26  # a quarter of a gigabyte as uint32


def shuffle(folders: Sequence[Path], journal: Journal, workers: int) -> None:
    """Write the documents of all `folders` in the order of the journal's seed, and finish it.

    Continues from the last commit. The bytes depend on the documents and the seed, not on `workers` (threads).
    """
    pieces = {
        split: [open_shards(folder / split, verify="size") for folder in folders]
        for split in splits_of(journal.settings)
    }
    writers = journal.open_writers(pieces["train"][0].dtype)
    total = sum(piece.tokens * piece.dtype.itemsize for split in pieces.values() for piece in split)
    progress = Progress("shuffled", total, _done(writers))
    seed = journal.settings["shuffle"]
    with ThreadPoolExecutor(workers) as pool:
        for split, writer in writers.items():
            for tokens, ends in Shuffled(pieces[split], seed, pool).blocks(writer.documents):
                writer.append(tokens, ends)
                journal.commit_if_due()
                progress.update(_done(writers))
    progress.close()
    journal.commit()
    for split, writer in writers.items():
        _, description = joined_manifest(folders, split)
        writer.finish(description | {"shuffle": {"seed": seed}})
    journal.finish()


class Shuffled:
    """The documents of several corpora of one dtype, in an order that depends on `seed` and their number."""

    def __init__(self, pieces: Sequence[TokenShards], seed: int, pool: Executor) -> None:
        """Order the documents of `pieces`; the threads of `pool` read."""
        self._dtype = pieces[0].dtype
        self._seed = seed
        self._pool = pool
        self._shards = [(piece, number) for piece in pieces for number in range(len(piece.shards))]
        counts = [piece.shards[number].documents for piece, number in self._shards]
        self._firsts = np.cumsum([0, *counts])  # the number of each shard's first document, then the count of all

    def blocks(self, place: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, from document `place` of the order on, the tokens of some documents and their ends in them, int64.

        A block has BLOCK_DOCUMENTS at most, and BLOCK_TOKENS unless its only document is longer.
        """
        count = int(self._firsts[-1])
        if not count:
            return
        order = SampleOrder(count, self._seed)
        while place < count:
            documents = order.many(place, min(place + BLOCK_DOCUMENTS, count))
            starts, stops = self._bounds(documents)
            ends = np.cumsum(stops - starts)
            fitting = max(1, int(np.searchsorted(ends, BLOCK_TOKENS, side="right")))
            yield self._tokens(documents[:fitting], starts, ends), ends[:fitting]
            place += fitting

    def _bounds(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the start and the end of each document in its shard, both int64."""
        starts, stops = np.zeros((2, len(documents)), dtype=np.int64)

        def read(shard: int, places: np.ndarray) -> None:
            piece, number = self._shards[shard]
            ends = piece.open_ends(number)
            within = documents[places] - self._firsts[shard]
            stops[places] = ends[within]
            starts[places] = np.where(within > 0, ends[within - 1], 0)
            piece.close(number)  # a large corpus has more shards than a process may have open

        self._each_shard(read, documents)
        return starts, stops

    def _tokens(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the documents, which start at `starts` in their shards, one after another; they end at `ends`."""
        gathered = np.empty(ends[len(documents) - 1], dtype=self._dtype)
        places_of = np.concatenate([[0], ends])

        def read(shard: int, places: np.ndarray) -> None:
            piece, number = self._shards[shard]
            tokens = piece.open_tokens(number)
            bounds = zip(places_of[places].tolist(), ends[places].tolist(), starts[places].tolist(), strict=True)
            for first, end, start in bounds:
                gathered[first:end] = tokens[start : start + end - first]
            piece.close(number)

        self._each_shard(read, documents)
        return gathered

    def _each_shard(self, read: Callable[[int, np.ndarray], None], documents: np.ndarray) -> None:
        """Call `read` with each shard that has some of `documents`, and their places there, as they lie in the shard."""
        on_disk = np.argsort(documents)
        shards, firsts = np.unique(np.searchsorted(self._firsts, documents[on_disk], "right") - 1, return_index=True)
        list(self._pool.map(read, shards.tolist(), np.split(on_disk, firsts[1:])))


def _done(writers: dict[str, ShardWriter]) -> tuple[int, int, int]:
    """Return the bytes, documents and tokens so far."""
    documents, tokens = written(writers)
    return tokens * writers["train"].dtype.itemsize, documents, tokens
