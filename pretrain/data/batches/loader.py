"""The batches of one rank; the whole state is one integer, the samples that the run has consumed.

A global batch is the next samples of the run, and rank r of R takes the r-th of R equal slices. So the samples of a step
do not depend on the number of ranks. Ranks are data-parallel ranks throughout this file: under tensor parallelism several
processes read the same slice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from pretrain.data.batches.batch import MicroBatch
from pretrain.data.batches.batch_sizes import BatchSizes
from pretrain.data.batches.feed import Feed, Slots
from pretrain.data.batches.memory import Memory
from pretrain.data.batches.order import FileOrder
from pretrain.data.batches.samples import SampleRows, Samples
from pretrain.data.batches.stream import Stream
from pretrain.errors import UserError

HANDED_TOKENS = 1 << 20  # small steps pass from thread to thread several at a time
HANDED_AHEAD = 2
CLOSE_S = 5.0
LOCATED_SAMPLES = 1 << 13  # numpy takes as long to locate one sample as some thousand

Step = list[MicroBatch]


class Loader:
    """Endless training batches for one rank, read ahead by one background thread.

    Attributes:
        feed: The samples of the run.
        position: The number of samples that all ranks together have taken through `next_batch`, whatever is read ahead.
            A loader made with that position continues from there, on any number of ranks.
        wait_s: The seconds that `next_batch` had to wait, in all.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        global_batch_size: int | BatchSizes,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        position: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Start to read ahead from `position`.

        Args:
            feed: The samples of the run; the loader closes it when it is closed.
            global_batch_size: The samples of an optimizer step, over all ranks: a number, or one for each place in the data.
            micro_batch_size: The samples of a forward pass on one rank.
            rank: The data-parallel rank.
            world_size: The number of data-parallel ranks.
            position: The samples that the run has consumed.
            pin_memory: Read into pinned memory, from which copies to a device overlap with computation.

        Raises:
            UserError: The sizes do not fit together.
        """
        given = global_batch_size
        self._sizes = BatchSizes.constant(given) if isinstance(given, int) else given
        check_sizes(self._sizes, micro_batch_size, world_size)
        self.feed = feed
        self.position = position
        self.wait_s = 0.0
        self._rank, self._world_size = rank, world_size
        largest = self._sizes.end // world_size
        self._steps = max(1, HANDED_TOKENS // (largest * feed.seq_len))
        self._batches = _Batches(feed, self._steps * largest, micro_batch_size, pin_memory)
        self._here: list[Step] = []  # handed over, the next step last
        self._handed: queue.Queue[list[Step] | Exception] = queue.Queue(HANDED_AHEAD)
        self._device = torch.cuda.current_device() if pin_memory else None
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="loader", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` and return whether the next step's batches, or the error that replaces them, are here."""
        if not self._here and self._failure is None:
            self._receive(timeout_s)
        return bool(self._here) or self._failure is not None

    @property
    def failed(self) -> bool:
        """`next_batch` would raise."""
        return not self._here and self._failure is not None

    def next_batch(self) -> Step:
        """Return this rank's micro-batches of the next optimizer step, on the CPU.

        An error while a sample is read is raised when its step is due, and at every later call.
        """
        while not self.wait(timeout_s=1.0):
            pass
        if not self._here and self._failure is not None:
            raise self._failure
        self.position += self._sizes.at(self.position)
        return self._here.pop()

    def close(self) -> None:
        """Stop reading ahead and release the shards, unless storage that does not answer holds the reader up."""
        self._closing.set()
        self._here.clear()
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:  # a reader that waits for room in the queue must be let go
                self._handed.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)
        if not self._thread.is_alive():
            self.feed.close()

    def _receive(self, timeout_s: float) -> None:
        if self._closing.is_set():
            raise RuntimeError("the loader is closed")
        began = time.perf_counter()
        try:
            handed = self._handed.get(timeout=timeout_s)
        except queue.Empty:
            return
        finally:
            self.wait_s += time.perf_counter() - began
        if isinstance(handed, Exception):
            self._failure = handed
        else:
            self._here = handed[::-1]

    def _read_ahead(self, position: int) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # else pinning would begin a context on the first device of the node
        located = handed = 1  # steps at a time: one, since it is waited for, then more and more
        try:
            while not self._closing.is_set():
                size, equal = self._sizes.stretch(position)
                located = located if equal is None else min(located, equal)
                mine = slice_of_rank(size, self._rank, self._world_size)
                per_step = len(mine)
                firsts = position + np.arange(located)[:, None] * size
                slots = self.feed.at((firsts + np.array(mine)).ravel())
                for start in range(0, located * per_step, handed * per_step):
                    self._hand_over(slots.part(slice(start, start + handed * per_step)), per_step)
                position += located * size
                handed = min(2 * handed, self._steps)
                located = max(handed, min(2 * located, LOCATED_SAMPLES // per_step))
        except Exception as error:
            self._handed.put(error)

    def _hand_over(self, slots: Slots, per_step: int) -> None:
        """Read the samples of whole steps, `per_step` in each, and queue them."""
        if self._closing.is_set():
            return
        steps = len(slots.places) // per_step
        try:
            batches = self._batches.read(slots)
        except Exception:
            if steps == 1:
                raise
            for start in range(0, len(slots.places), per_step):  # the steps before the one that fails are good
                self._hand_over(slots.part(slice(start, start + per_step)), per_step)
            return
        each = len(batches) // steps
        self._handed.put([batches[start : start + each] for start in range(0, len(batches), each)])


class _Batches:
    """Reads micro-batches into memory that is used again."""

    def __init__(self, feed: Feed, samples: int, micro_batch_size: int, pin_memory: bool = False) -> None:
        """samples: the most that one `read` is asked for."""
        self._feed = feed
        self._micro_batch_size = micro_batch_size
        shape = samples, feed.seq_len
        self._tokens = Memory((samples, feed.seq_len + 1), torch.from_numpy(np.empty(0, feed.dtype)).dtype, pin_memory)
        self._counted = Memory(shape, torch.bool, pin_memory) if feed.masked else None
        self._positions = Memory(shape, torch.int64, pin_memory) if feed.carries_documents else None

    def read(self, slots: Slots) -> list[MicroBatch]:
        """Return the samples of `slots`, in order."""
        count = len(slots.places)
        tokens = self._tokens.take(count)
        counted = None if self._counted is None else self._counted.take(count)
        positions = None if self._positions is None else self._positions.take(count)
        rows = SampleRows(
            tokens.numpy(),
            None if counted is None else counted.numpy(),
            None if positions is None else positions.numpy(),
        )
        self._feed.read(slots, rows)
        micro_batches = [
            slice(start, start + self._micro_batch_size) for start in range(0, count, self._micro_batch_size)
        ]
        return [
            MicroBatch(
                tokens[part],
                None if counted is None else counted[part],
                None if positions is None else positions[part],
            )
            for part in micro_batches
        ]


def eval_batches(
    samples: Samples,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    batches: int,
) -> Iterator[MicroBatch]:
    """Return this rank's micro-batches of the first samples in file order.

    All ranks together read `batches` global batches, so the samples do not depend on the number of ranks. Where the
    shards hold fewer, they read as many as fill a micro-batch on every rank. Every rank gets the same number of
    micro-batches.

    Args:
        samples: The samples of the validation corpus.
        global_batch_size: The samples of a global batch.
        micro_batch_size: The samples of a micro-batch.
        rank: The data-parallel rank.
        world_size: The number of data-parallel ranks.
        batches: The number of global batches.

    Raises:
        UserError: Not even one micro-batch can be filled on all ranks; raised at the call.
    """
    together, num_samples = micro_batch_size * world_size, int(samples.counts.sum())
    if num_samples < together:
        raise UserError(
            f"the validation shards in '{samples.shards.location}' hold {num_samples} samples of {samples.seq_len} "
            f"tokens, and one batch on {world_size} data-parallel ranks takes {together} (data.micro_batch_size "
            f"{micro_batch_size} x {world_size}). "
            "Prepare more validation text (--val-fraction), or lower data.micro_batch_size or data.seq_len."
        )
    rounds = min(batches * global_batch_size, num_samples) // together
    feed = Feed([Stream(samples, FileOrder(samples.counts))])
    reader = _Batches(feed, micro_batch_size, micro_batch_size)
    starts = range(rank * micro_batch_size, rounds * together, together)
    return (reader.read(feed.at(np.arange(start, start + micro_batch_size)))[0] for start in starts)


def slice_of_rank(global_batch_size: int, rank: int, world_size: int) -> range:
    """Return the samples of each global batch that `rank` takes, counted from its first."""
    size = global_batch_size // world_size
    return range(rank * size, (rank + 1) * size)


def check_sizes(sizes: BatchSizes, micro_batch_size: int, world_size: int) -> None:
    """Raise UserError unless in every step each rank gets the same number of full micro-batches."""
    if sizes.start == sizes.end:
        check_batch_sizes(sizes.end, micro_batch_size, world_size)
        return
    for key, value in {"start": sizes.start, "steps_of": sizes.increment}.items():
        unit = micro_batch_size * world_size
        if value % unit:
            below, above = value // unit * unit, (value // unit + 1) * unit
            raise UserError(
                f"data.global_batch_size.{key} {value} is not a multiple of data.micro_batch_size {micro_batch_size} x "
                f"{world_size} data-parallel ranks = {unit}, so at some step the ranks could not share the batch. Set it to "
                f"{f'{below} or ' if below else ''}{above}."
            )


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise UserError, with the nearest sizes that work, unless every rank gets the same number of full micro-batches."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit == 0 and global_batch_size > 0:
        return
    below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
    nearest = f"{below} or {above}" if below > 0 else f"{above}"
    share, left = divmod(global_batch_size, world_size)
    if share and not left:
        fitting = _nearest_divisor(share, micro_batch_size)
        advice = f"data.micro_batch_size to {fitting}, the nearest that fits these ranks"
    else:
        ranks = _nearest_divisor(global_batch_size, world_size)
        fitting = _nearest_divisor(global_batch_size // ranks, micro_batch_size)
        advice = f"start {ranks} data-parallel ranks, the nearest number that can share it, with data.micro_batch_size {fitting}"
    raise UserError(
        f"data.global_batch_size {global_batch_size} is not a multiple of data.micro_batch_size {micro_batch_size} x "
        f"{world_size} data-parallel ranks = {unit}. Set it to {nearest}, or {advice}. "
        "A run that resumes keeps its global batch."
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` that is nearest to `wanted`, of two the smaller one."""
    return min((each for each in range(1, number + 1) if number % each == 0), key=lambda each: abs(each - wanted))


def check_enough_samples(samples: Samples, global_batch_size: int, world_size: int) -> None:
    """Raise UserError unless a corpus holds a sample for every rank and at least one global batch."""
    num_samples = int(samples.counts.sum())
    held = (
        f"the shards in '{samples.shards.location}' hold {num_samples} samples ({samples.shards.tokens} tokens in "
        f"{len(samples.counts)} shards, data.seq_len {samples.seq_len})"
    )
    if num_samples < world_size:
        raise UserError(
            f"{held}, fewer than the {world_size} data-parallel ranks. Lower data.seq_len, prepare more text in "
            "larger shards (--shard-tokens), or use fewer ranks."
        )
    if num_samples < global_batch_size:
        raise UserError(
            f"{held}, fewer than one global batch of {global_batch_size}. "
            "Prepare more text, or lower data.global_batch_size or data.seq_len."
        )
