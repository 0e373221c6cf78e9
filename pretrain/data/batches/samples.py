"""A sample: seq_len + 1 tokens of one shard, known by its number in that shard."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from pretrain.data.batches.boundaries import restart
from pretrain.data.tokens.shards import TokenShards
from pretrain.errors import UserError


@dataclass(frozen=True)
class SampleRows:
    """Memory that samples are written into, one sample a row.

    Attributes:
        tokens: (rows, seq_len + 1), integers wide enough for the corpus's ids.
        counted: (rows, seq_len) bool, which targets count; None where all do.
        positions: (rows, seq_len) int64, starting at 0 again with every document; None where attention may cross them.
    """

    tokens: np.ndarray
    counted: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> SampleRows:
        return SampleRows(
            self.tokens[rows],
            None if self.counted is None else self.counted[rows],
            None if self.positions is None else self.positions[rows],
        )

    @staticmethod
    def empty(rows: int, seq_len: int, dtype: np.dtype, masked: bool, carries_documents: bool) -> SampleRows:
        """Return rows with any content, whose tokens have `dtype`."""
        return SampleRows(
            np.empty((rows, seq_len + 1), dtype=dtype),
            np.empty((rows, seq_len), dtype=bool) if masked else None,
            np.empty((rows, seq_len), dtype=np.int64) if carries_documents else None,
        )

    def put(self, rows: slice | np.ndarray, others: SampleRows) -> None:
        """Write `others` into these rows, widening what is narrower."""
        self.tokens[rows] = others.tokens
        if self.counted is not None:
            self.counted[rows] = others.counted
        if self.positions is not None:
            self.positions[rows] = others.positions


class Samples(Protocol):
    """The samples of one corpus; none crosses the border of a shard.

    Attributes:
        shards: The corpus.
        seq_len: The inputs of a sample.
        counts: (shards,) int64, the samples of each shard.
        masked: Some targets do not count, so rows need `counted`.
        carries_documents: Attention stays within documents, so rows need `positions`.
    """

    shards: TokenShards
    seq_len: int
    counts: np.ndarray
    masked: bool
    carries_documents: bool

    def read(self, shards: np.ndarray, numbers: np.ndarray, into: SampleRows) -> None:
        """Write sample numbers[i] of shard shards[i], both (samples,) int64, into row i.

        Raises:
            UserError: A token is no id of the vocabulary.
        """

    def documents(self, shard: int, number: int) -> list[tuple[int, int, int]]:
        """Return the documents in a sample's inputs, in order: (number in the shard, first token, token after the last)."""


class Concatenated:
    """Documents one after the other: sample k of a shard is its tokens k * seq_len to (k + 1) * seq_len inclusive.

    The last token of a sample is the first of the next, so every token of a shard but the first is a target. The rest at
    the end of a shard, less than seq_len tokens, is not used.
    """

    def __init__(
        self, shards: TokenShards, seq_len: int, document_attention: bool = False, vocab_size: int | None = None
    ) -> None:
        """Cut `shards` into samples.

        Args:
            shards: The corpus.
            seq_len: The inputs of a sample.
            document_attention: Positions restart with each document, and its last token, the separator, has no target.
            vocab_size: The ids of the model; to read a token that is not below it is a UserError. None: no check.
        """
        self.shards = shards
        self.seq_len = seq_len
        self.counts = np.array([max(0, shard.tokens - 1) // seq_len for shard in shards.shards], dtype=np.int64)
        self.masked = self.carries_documents = document_attention
        self._check = IdCheck(shards, vocab_size)
        self._scratch = threading.local()

    def read(self, shards: np.ndarray, numbers: np.ndarray, into: SampleRows) -> None:
        if (numbers >= self.counts[shards]).any():
            raise IndexError(f"'{self.shards.location}' has no samples {numbers[numbers >= self.counts[shards]]}")
        by_shard = np.argsort(shards, kind="stable")
        borders = [0, *(np.flatnonzero(np.diff(shards[by_shard])) + 1).tolist(), len(shards)]
        inputs, last = self._memory(len(shards))
        for start, stop in pairwise(borders):
            rows = by_shard[start:stop]
            shard, starts = int(shards[rows[0]]), numbers[rows] * self.seq_len
            tokens = self.shards.open_tokens(shard)
            whole = tokens[: int(self.counts[shard]) * self.seq_len].reshape(-1, self.seq_len)
            # The default mode would write into a copy of `out` first.
            np.take(whole, numbers[rows], axis=0, out=inputs[start:stop], mode="clip")
            np.take(tokens, starts + self.seq_len, out=last[start:stop], mode="clip")
            self._check(shard, starts, inputs[start:stop])
            self._check(shard, starts + self.seq_len, last[start:stop, None])
            if into.positions is not None and into.counted is not None:
                ends = self.shards.open_ends(shard)
                into.positions[rows], into.counted[rows] = restart(ends, starts, self.seq_len)
        all_rows = by_shard if len(borders) > 2 else slice(None)
        into.tokens[all_rows, :-1] = inputs
        into.tokens[all_rows, -1] = last

    def documents(self, shard: int, number: int) -> list[tuple[int, int, int]]:
        ends = self.shards.open_ends(shard)
        start, stop = number * self.seq_len, (number + 1) * self.seq_len
        # A plain int would make numpy compare uint64 as float64.
        first, last = np.searchsorted(ends, np.array([start, stop - 1], dtype=ends.dtype), side="right").tolist()
        borders = [start, *ends[first:last].tolist(), stop]
        return [(first + i, *borders[i : i + 2]) for i in range(last - first + 1)]

    def _memory(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return arrays (rows, seq_len) and (rows,) of the shards' dtype.

        A thread gets the same memory each time: fresh pages cost more than the copying.
        """
        if not hasattr(self._scratch, "inputs") or len(self._scratch.inputs) < rows:
            self._scratch.inputs = np.empty((rows, self.seq_len), dtype=self.shards.dtype)
            self._scratch.last = np.empty(rows, dtype=self.shards.dtype)
        return self._scratch.inputs[:rows], self._scratch.last[:rows]


class IdCheck:
    """A check that tokens are ids of the vocabulary."""

    def __init__(self, shards: TokenShards, vocab_size: int | None) -> None:
        """Check against `vocab_size`; do nothing if it is None, or the tokens' dtype holds no larger id."""
        self._shards = shards
        self._unsigned = np.dtype(f"u{shards.dtype.itemsize}")  # as which negative numbers are large
        needed = vocab_size is not None and vocab_size <= np.iinfo(self._unsigned).max
        self._vocab_size = vocab_size if needed else None

    def __call__(self, shard: int, starts: np.ndarray, tokens: np.ndarray) -> None:
        """Raise UserError unless all `tokens`, (rows, length), are ids; row i begins at token starts[i] of the shard."""
        if self._vocab_size is None or int(tokens.view(self._unsigned).max()) < self._vocab_size:
            return
        row, column = np.argwhere(tokens.view(self._unsigned) >= self._vocab_size)[0].tolist()
        raise UserError(
            f"token {starts[row] + column:,} of {self._shards.shards[shard].file} in '{self._shards.location}' is "
            f"{tokens[row, column]:,}, and the vocabulary has {self._vocab_size:,} entries. The file is corrupt or was "
            "made with another tokenizer: restore it, or prepare the data again."
        )
