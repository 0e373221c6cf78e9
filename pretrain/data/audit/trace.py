"""Traces the documents that a step of a run reads: the run's own feed gives them, and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.audit.documents import Decoder, Documents
from pretrain.data.batches.feed import Feed


def trace(feed: Feed, samples: Sequence[int], decoder: Decoder | None = None) -> list[dict]:
    """Return the place of each sample and the documents in its inputs.

    Args:
        feed: The feed of the run.
        samples: Numbers of samples, from 0 in the run's order.
        decoder: The tokenizer, with which documents have their texts.

    Returns:
        JSON of each sample. It is sample `number` of shard `shard`, and `padding` of its places hold no document. A
        document's `tokens` are [first, after the last] in the shard; with a decoder it has its `text` too.
    """
    slots = feed.at(np.asarray(samples, dtype=np.int64))
    of_source = [Documents(stream.shards) for stream in feed.streams]
    rows = []
    for sample, source, place, shard, number in zip(samples, *(column.tolist() for column in slots), strict=True):
        stream, documents = feed.streams[source], of_source[source]
        pieces = stream.samples.documents(shard, number)
        described = [documents.describe(shard, *piece) for piece in pieces]
        if decoder is not None:
            add_texts(described, stream.shards.open_tokens(shard), decoder)
        rows.append(
            {
                "sample": sample,
                "corpus": stream.shards.location,
                "epoch": stream.order.epoch(place),
                "shard": shard,
                "file": stream.shards.shards[shard].file,
                "number": number,
                "padding": feed.seq_len - sum(stop - start for _, start, stop in pieces),
                "documents": described,
            }
        )
    return rows


def add_texts(described: Sequence[dict], tokens: np.ndarray, decoder: Decoder) -> None:
    """Add its `text` to each result of `Documents.describe`; tokens: those of the shard."""
    for document in described:
        document["text"] = decoder.text(tokens[slice(*document["tokens"])])
