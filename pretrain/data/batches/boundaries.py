"""Document boundaries within samples: positions restart there, and no target crosses one.

A separator, the last token of its document, is followed by another document's first token. Where attention stays within
documents, that token is not to be predicted.
"""

from __future__ import annotations

import numpy as np


def restart(ends: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions and the counted targets of some samples of one shard.

    Reads O(log(documents)) of `ends` per sample.

    Args:
        ends: (documents,) int64 or uint64, ascending, the token after each document of the shard.
        starts: (samples,) int64, the first token of each sample.
        seq_len: The inputs of a sample.

    Returns:
        positions: (samples, seq_len) int64, tokens since the document's first one in the sample.
        counted: (samples, seq_len) bool, False where a document's last token is the input.
    """
    starts = np.asarray(starts)
    tokens = starts.astype(ends.dtype)  # numpy would turn all of a uint64 `ends` to float64 to look for int64
    first = np.searchsorted(ends, tokens, side="right")
    within = np.searchsorted(ends, tokens + ends.dtype.type(seq_len), side="right") - first
    samples = np.repeat(np.arange(len(starts)), within)
    nth = np.arange(len(samples)) - np.repeat(np.cumsum(within) - within, within)
    places = ends[first[samples] + nth].astype(np.int64) - starts[samples]  # of the tokens after documents: 1..seq_len

    counted = np.ones((len(starts), seq_len), dtype=bool)
    counted[samples, places - 1] = False
    begun = np.zeros((len(starts), seq_len), dtype=np.int64)
    inner = places < seq_len
    begun[samples[inner], places[inner]] = places[inner]
    np.maximum.accumulate(begun, axis=1, out=begun)
    return np.subtract(np.arange(seq_len), begun, out=begun), counted
