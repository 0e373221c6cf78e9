"""From shards to the batches of one rank; the whole state is one integer, the samples that the run has consumed.

Sample k is seq_len + 1 consecutive tokens from token k * seq_len on: its last token is the first of sample k + 1, so
every token but the very first is a target. A global batch is the next samples of the run's order, and rank r of R takes the
r-th of R equal slices, so what a step trains on does not depend on the number of ranks. Ranks are data-parallel ranks
throughout this file: under tensor parallelism several processes read the same slice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from pretrain.data.batches.order import SampleOrder
from pretrain.data.tokens.shards import TokenShards
from pretrain.errors import UserError

PREFETCHED_BATCHES = 2


class Loader:
    """Endless training batches for one rank, read ahead by one background thread.

    `position` is the number of samples all ranks together have taken through `next_batch`, whatever is read ahead;
    a loader made with that position goes on from there, on any number of ranks. `wait_s` adds up the seconds that
    `next_batch` had to wait.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
    ) -> None:
        """Sizes are in samples; UserError when they do not fit together or the shards hold too little."""
        check_batch_sizes(global_batch_size, micro_batch_size, world_size)
        check_enough_samples(shards, seq_len, global_batch_size, world_size)
        self.wait_s = 0.0
        self._position = position
        self._shards = shards
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._slice = (global_batch_size // world_size * rank, global_batch_size // world_size * (rank + 1))
        self._order = SampleOrder(count_samples(shards, seq_len), seed)
        self._ready: queue.Queue[list[torch.Tensor] | Exception] = queue.Queue(PREFETCHED_BATCHES)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="loader", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        return self._position

    def next_batch(self) -> list[torch.Tensor]:
        """This rank's micro-batches of the next optimizer step, each (micro_batch_size, seq_len + 1) int64 on the CPU."""
        if self._closing.is_set():
            raise RuntimeError("the loader is closed")
        if self._failure is None:
            began = time.perf_counter()
            batch = self._ready.get()
            self.wait_s += time.perf_counter() - began
            if not isinstance(batch, Exception):
                self._position += self._global_batch_size
                return batch
            self._failure = batch
        raise self._failure

    def close(self) -> None:
        """Stop reading ahead; the thread has ended when this returns."""
        self._closing.set()
        while self._thread.is_alive():
            try:  # a reader that waits for room in the queue must be let go
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _read_ahead(self, position: int) -> None:
        first, last = self._slice
        try:
            while not self._closing.is_set():
                samples = self._order.many(position + first, position + last)
                self._ready.put(_read_samples(self._shards, samples, self._seq_len, self._micro_batch_size))
                position += self._global_batch_size
        except Exception as error:
            self._ready.put(error)


def eval_batches(
    shards: TokenShards,
    *,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    batches: int,
) -> Iterator[torch.Tensor]:
    """This rank's micro-batches, (micro_batch_size, seq_len + 1) int64, of the first samples in file order.

    All ranks together read `batches` global batches, so the samples do not depend on the number of ranks; where the
    shards hold fewer, as many as fill a micro-batch on every rank. Every rank gets the same number of micro-batches.
    UserError, at the call, when not even one can be filled on all ranks.
    """
    together = micro_batch_size * world_size
    num_samples = count_samples(shards, seq_len)
    if num_samples < together:
        raise UserError(
            f"the validation shards in '{shards.folder}' hold {num_samples} samples of {seq_len} tokens, and one batch "
            f"on {world_size} data-parallel ranks takes {together} (data.micro_batch_size {micro_batch_size} x "
            f"{world_size}). "
            "Prepare more validation text (--val-fraction), or lower data.micro_batch_size or data.seq_len."
        )
    rounds = min(batches * global_batch_size, num_samples) // together
    starts = range(rank * micro_batch_size, rounds * together, together)
    return (
        _read_samples(shards, np.arange(start, start + micro_batch_size), seq_len, micro_batch_size)[0]
        for start in starts
    )


def count_samples(shards: TokenShards, seq_len: int) -> int:
    """How many samples of `seq_len` inputs and as many targets the shards hold."""
    return max(0, shards.tokens - 1) // seq_len


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """UserError, with the nearest sizes that work, unless every rank gets the same number of full micro-batches."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0 and global_batch_size > 0:
        return
    below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
    nearest = f"{below} or {above}" if below > 0 else f"{above}"
    raise UserError(
        f"data.global_batch_size {global_batch_size} is not a multiple of data.micro_batch_size {micro_batch_size} x "
        f"{world_size} data-parallel ranks = {unit}. Set it to {nearest}, or change data.micro_batch_size or the "
        "number of ranks."
    )


def check_enough_samples(shards: TokenShards, seq_len: int, global_batch_size: int, world_size: int) -> None:
    """UserError unless the shards hold a sample for every rank and at least one global batch."""
    num_samples = count_samples(shards, seq_len)
    held = (
        f"the shards in '{shards.folder}' hold {num_samples} samples ({shards.tokens} tokens, data.seq_len {seq_len})"
    )
    if num_samples < world_size:
        raise UserError(
            f"{held}, fewer than the {world_size} data-parallel ranks. Prepare more text, or use fewer ranks."
        )
    if num_samples < global_batch_size:
        raise UserError(
            f"{held}, fewer than one global batch of {global_batch_size}. "
            "Prepare more text, or lower data.global_batch_size or data.seq_len."
        )


def _read_samples(shards: TokenShards, samples: np.ndarray, seq_len: int, micro_batch_size: int) -> list[torch.Tensor]:
    """The given samples in micro-batches, widened to int64."""
    tokens = np.empty((len(samples), seq_len + 1), dtype=np.int64)
    for row, sample in zip(tokens, samples.tolist(), strict=True):
        row[:] = shards.read(sample * seq_len, (sample + 1) * seq_len + 1)
    return list(torch.from_numpy(tokens).split(micro_batch_size))
