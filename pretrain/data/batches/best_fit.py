"""Best-fit-decreasing bin packing: it decides which documents share a sample.

From the longest document to the shortest, each goes into the sample with the least room that still takes it; where
none does, into a new one. Documents of equal length are interchangeable, and so are samples with equal room. They are
placed together: time is O(documents + distinct pairs of length and room), not O(documents · log).

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def cut_into_pieces(ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the documents of a shard into the pieces that are packed.

    A document of at most `capacity` tokens is one piece. A longer one is cut into pieces of `capacity` tokens, and a
    rest, each beginning with the last token of the one before: so every token but the first is predicted once. A document
    of one token predicts nothing, and is left out.

    Args:
        ends: (documents,), the token after each document.
        capacity: The tokens of a sample.

    Returns:
        The first token and the length of each piece, both int64 (pieces,), in the order of the shard.
    """
    ends = ends.astype(np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    step = capacity - 1
    pieces = np.maximum(0, -((1 - ends + starts) // step))
    first = np.cumsum(pieces) - pieces
    nth = np.arange(pieces.sum()) - np.repeat(first, pieces)
    piece_starts = np.repeat(starts, pieces) + nth * step
    return piece_starts, np.minimum(np.repeat(ends, pieces) - piece_starts, capacity)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack pieces into bins.

    Args:
        lengths: (pieces,), 1 to `capacity`.
        capacity: The sum of lengths that a bin holds at most.

    Returns:
        The bin of each piece, int64 (pieces,); bins are numbered in the order in which they first occur.
    """
    largest_first = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    bins = np.empty(len(lengths), dtype=np.int64)
    placed = 0
    for some in _placements(np.bincount(lengths, minlength=capacity + 1), capacity):
        bins[largest_first[placed : placed + len(some)]] = some
        placed += len(some)
    return _numbered_by_first_occurrence(bins)


def _placements(how_many: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    """Yield the bins of the pieces from the longest to the shortest, some pieces of one length at a time.

    how_many: the number of pieces of each length.
    """
    by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by the room that they have
    has_bins = 0  # bit r: by_room[r] is not empty
    made = 0
    for length in np.flatnonzero(how_many)[::-1].tolist():
        waiting = int(how_many[length])
        while waiting:
            fitting = has_bins >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length  # a bin stays the best fit until it takes no more
            wanted = -(-waiting // each)
            if fitting:
                bins = _take(by_room[room], wanted)
                has_bins ^= (not by_room[room]) << room
            else:
                bins = np.arange(made, made + wanted)
                made += wanted
            here = min(waiting, each * len(bins))
            yield np.repeat(bins, each)[:here]
            waiting -= here
            in_last = here - each * (len(bins) - 1)
            for left, some in ((room - each * length, bins[:-1]), (room - in_last * length, bins[-1:])):
                if left and len(some):
                    by_room[left].append(some)
                    has_bins |= 1 << left


def _take(stack: list[np.ndarray], wanted: int) -> np.ndarray:
    """Take up to `wanted` bins off the stack."""
    taken = []
    while wanted and stack:
        bins = stack.pop()
        if len(bins) > wanted:
            stack.append(bins[wanted:])
        taken.append(bins[:wanted])
        wanted -= len(taken[-1])
    return np.concatenate(taken)


def _numbered_by_first_occurrence(bins: np.ndarray) -> np.ndarray:
    count = int(bins.max(initial=-1)) + 1
    first = np.empty(count, dtype=np.int64)
    first[bins[::-1]] = np.arange(len(bins))[::-1]
    number = np.empty(count, dtype=np.int64)
    number[np.argsort(first)] = np.arange(count)
    return number[bins]
