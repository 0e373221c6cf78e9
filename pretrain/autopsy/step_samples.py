"""The samples that a step read: the source, the statistics of the tokens, the loss and the text of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any

import numpy as np
import torch

from pretrain.config.schema import ParallelSection
from pretrain.data.audit.documents import Decoder
from pretrain.data.audit.trace import add_texts, trace
from pretrain.data.batches.batch import NO_TARGET, MicroBatch
from pretrain.data.batches.feed import Feed
from pretrain.data.tokens.shards import TokenShards
from pretrain.distributed.ranks import Ranks
from pretrain.model.loss import CROSS_ENTROPY
from pretrain.sharded.collectives import all_gather
from pretrain.sharded.engine_protocol import Engine


@torch.no_grad()
def sequence_losses(
    engine: Engine, micro_batches: Sequence[MicroBatch], parallel: ParallelSection, ranks: Ranks
) -> list[float | None]:
    """Return the mean cross-entropy of each sequence of the global batch, with the present weights and without dropout.

    Collective: one forward pass for each sequence, of all ranks at once.

    Args:
        parallel: which ranks share a batch.

    Returns:
        The losses in nats per token, None for a sequence in which no target counts.
    """
    engine.eval()
    rows = []
    for batch in micro_batches:
        batch = batch.to(ranks.device)
        for row in range(len(batch.tokens)):
            one = _sequence(batch, row)
            loss = engine(one.inputs, one.targets, position_ids=one.positions)[CROSS_ENTROPY]
            rows.append(torch.stack((loss.double(), (one.targets != NO_TARGET).sum().double())))
    everyones = all_gather(torch.stack(rows)).unflatten(0, (-1, parallel.sequence, parallel.tensor))
    whole = everyones[:, :, 0].mean(1)  # over the slices of a sequence
    return [loss if counted else None for loss, counted in whole.flatten(0, 1).tolist()]


def _sequence(batch: MicroBatch, row: int) -> MicroBatch:
    """Return a micro-batch of one sequence."""
    rows = slice(row, row + 1)
    return MicroBatch(
        batch.tokens[rows],
        None if batch.counted is None else batch.counted[rows],
        None if batch.positions is None else batch.positions[rows],
    )


class Batch:
    """The samples of a step.

    Attributes:
        samples: dicts as from `trace`, with their `loss` and statistics of their tokens, the worst loss first.
    """

    def __init__(self, feed: Feed, samples: range, losses: Sequence[float | None], decoder: Decoder) -> None:
        self._feed, self._decoder = feed, decoder
        self._sources = feed.at(np.asarray(samples)).sources.tolist()
        self._first = samples.start
        rows = [
            {"loss": loss, **row, **self._token_statistics(row)}
            for row, loss in zip(trace(feed, samples), losses, strict=True)
        ]
        self.samples = sorted(rows, key=_worst_first)

    def with_texts(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with the `text` of each of its documents."""
        documents = [dict(document) for document in sample["documents"]]
        add_texts(documents, self._tokens(sample), self._decoder)
        return {**sample, "documents": documents}

    def close(self) -> None:
        """Close the shards that were read, so that remote ones may leave the cache."""
        for sample in self.samples:
            self._shards(sample).close(sample["shard"])

    def _token_statistics(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return statistics that show degenerate text: distinct tokens, the most frequent one, the longest run of one."""
        of_shard = self._tokens(row)
        tokens = np.concatenate([of_shard[slice(*document["tokens"])] for document in row["documents"]])
        values, counts = np.unique(tokens, return_counts=True)
        changes = np.flatnonzero(np.diff(tokens)) + 1
        runs = np.diff(np.concatenate(([0], changes, [len(tokens)])))
        return {
            "distinct_tokens": len(values),
            "top_token": self._decoder.token(int(values[counts.argmax()])),
            "top_token_share": float(counts.max() / len(tokens)),
            "longest_run": int(runs.max()),
        }

    def _tokens(self, row: dict[str, Any]) -> np.ndarray:
        """Return the tokens of the shard that holds the sample."""
        return self._shards(row).open_tokens(row["shard"])

    def _shards(self, row: dict[str, Any]) -> TokenShards:
        return self._feed.streams[self._sources[row["sample"] - self._first]].shards


@contextmanager
def read_batch(feed: Feed, tokenizer: str, samples: range, losses: Sequence[float | None]) -> Iterator[Batch]:
    """Yield the samples of a run, read again from `feed`. UserError if the `tokenizer` cannot be loaded."""
    batch = Batch(feed, samples, losses, Decoder(tokenizer))
    try:
        yield batch
    finally:
        batch.close()


def _worst_first(sample: dict[str, Any]) -> tuple[bool, float]:
    """Return a key that sorts NaN first, then losses from large to small. A sample without a loss counts as loss 0."""
    loss = sample["loss"]
    if loss is None:
        return True, 0.0
    return (False, 0.0) if isnan(loss) else (True, -loss)
