"""Copies the next micro-batch to the GPU while it computes on this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch

from pretrain.data.batches.batch import MicroBatch


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Yield each of the `batches` on `device`, in order.

    On a GPU the copy of each one is queued on a stream of its own before the one ahead of it is yielded. The host waits for
    no copy from pinned memory.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    ahead = None
    for batch in batches:
        following = _Copy(batch, device, _stream_of_copies(device))
        if ahead is not None:
            yield ahead.received()
        ahead = following
    if ahead is not None:
        yield ahead.received()


class _Copy:
    """A micro-batch on its way to a GPU."""

    def __init__(self, batch: MicroBatch, device: torch.device, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._batch = batch.to(device)
            self._arrived = stream.record_event()

    def received(self) -> MicroBatch:
        """Return the batch, for use on the current stream."""
        stream = torch.cuda.current_stream(self._batch.tokens.device)
        stream.wait_event(self._arrived)
        for tensor in self._batch:
            if tensor is not None:
                tensor.record_stream(stream)  # else its memory could be given to another copy while it is read here
        return self._batch


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
