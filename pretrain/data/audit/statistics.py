"""Statistics of a corpus: the lengths of its documents, the tokens it uses, and its source files.

Shards are read one after another, block by block. There is one count for every id and one for every length that occurs;
n tokens have at most sqrt(2 n) different lengths. So the statistics are exact and the memory is bounded.
"""

from __future__ import annotations

import numpy as np

from pretrain.data.audit.documents import Decoder
from pretrain.data.progress import Progress
from pretrain.data.tokens.corpus import TokenShards
from pretrain.data.tokens.verify import check_ids

BLOCK_TOKENS = 1 << 20
FETCHED_AHEAD = 3  # shards
LARGEST_VOCABULARY = 1 << 24  # ids are below this where a format does not say how many there are
LONG = (2048, 8192)
TOP = 20
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99, "max": 1.0}


def describe_corpus(shards: TokenShards, decoder: Decoder | None = None) -> dict:
    """Return all that is known of a corpus, as JSON.

    Args:
        shards: The corpus.
        decoder: Its tokenizer, with which the top tokens have their texts.

    Raises:
        UserError: An id is beyond the vocabulary; the message names its place.
    """
    counts, lengths = _count(shards, decoder.info.vocab_size if decoder else shards.vocab_size)
    return {
        **_properties(shards),
        "lengths": _distribution(*lengths),
        "histogram": _histogram(*lengths),
        "ids_used": int(np.count_nonzero(counts)),
        "top_tokens": _top_tokens(counts, decoder),
        **_sources(shards),
    }


def _properties(shards: TokenShards) -> dict:
    imported, text_bytes = shards.manifest.get("imported"), shards.text_bytes
    return {
        "location": shards.location,
        "format": shards.format,
        "imported_from": imported["format"] if imported else None,
        "dtype": shards.dtype.name,
        "tokens": shards.tokens,
        "documents": shards.documents,
        "shards": len(shards.shards),
        "bytes": shards.tokens * shards.dtype.itemsize,
        "text_bytes": text_bytes,
        "text_bytes_per_token": text_bytes / shards.tokens if text_bytes is not None and shards.tokens else None,
        "vocab_size": shards.vocab_size,
        "eos_id": shards.eos_id,
        "bos_id": shards.manifest.get("bos_id"),
        "tokenizer_fingerprint": shards.tokenizer_fingerprint,
        "fingerprint": shards.fingerprint,
        "shuffle": shards.manifest.get("shuffle"),
    }


def _sources(shards: TokenShards) -> dict:
    """Return the number of files that gave documents, and those that gave most."""
    sources = shards.manifest.get("sources", [])
    largest = sorted(sources, key=lambda source: -source["tokens"])[:TOP]
    return {"source_files": len(sources), "largest_sources": largest}


def _count(shards: TokenShards, vocab_size: int | None) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Count ids and lengths.

    Returns:
        The count of each id, int64 (ids,); and the lengths that occur, ascending, with their counts, both int64.
    """
    counts, lengths = np.zeros(0, np.int64), (np.zeros(0, np.int64), np.zeros(0, np.int64))
    progress, read = Progress("read", shards.tokens * shards.dtype.itemsize), 0
    documents = 0
    for number in range(len(shards.shards)):
        shards.fetch_ahead(range(number, min(number + FETCHED_AHEAD, len(shards.shards))))
        check_ids(shards, number, vocab_size or LARGEST_VOCABULARY)
        ends = shards.open_ends(number)
        lengths = _merged(lengths, np.unique(np.diff(ends, prepend=0), return_counts=True))
        documents += len(ends)
        tokens = shards.open_tokens(number)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[start : start + BLOCK_TOKENS]
            counts = _sum(counts, np.bincount(block))
            read += len(block)
            progress.update((read * shards.dtype.itemsize, documents, read))
        shards.close(number)
    progress.close()
    return counts, lengths


def _sum(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    longer, shorter = sorted((first, second), key=len, reverse=True)
    longer[: len(shorter)] += shorter
    return longer


def _merged(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of two histograms, ascending, and the sums of their counts."""
    values, places = np.unique(np.concatenate([first[0], second[0]]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, places, np.concatenate([first[1], second[1]]))
    return values, counts


def _distribution(values: np.ndarray, counts: np.ndarray) -> dict:
    """Summarise lengths. A quantile is the smallest length that occurs and that this share of documents does not exceed."""
    if not len(values):
        return {}
    below, tokens = np.cumsum(counts), values * counts
    places = {name: int(np.searchsorted(below, share * below[-1])) for name, share in QUANTILES.items()}
    return {
        **{name: int(values[place]) for name, place in places.items()},
        "mean": float(tokens.sum() / below[-1]),
        **{f"share_of_tokens_over_{long}": float(tokens[values > long].sum() / tokens.sum()) for long in LONG},
    }


def _histogram(values: np.ndarray, counts: np.ndarray) -> list[dict]:
    """Count documents and tokens by the power of two that their length reaches."""
    if not len(values):
        return []
    powers = np.frexp(values)[1] - 1
    return [
        {
            "from": 1 << power,
            "to": (2 << power) - 1,
            "documents": int(counts[powers == power].sum()),
            "tokens": int((values * counts)[powers == power].sum()),
        }
        for power in range(int(powers[0]), int(powers[-1]) + 1)
    ]


def _top_tokens(counts: np.ndarray, decoder: Decoder | None) -> list[dict]:
    ids = np.argsort(-counts, kind="stable")[: min(TOP, np.count_nonzero(counts))].tolist()
    return [
        {"id": number, "count": int(counts[number])} | ({"text": decoder.token(number)} if decoder else {})
        for number in ids
    ]
