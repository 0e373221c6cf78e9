"""Copies of micro-batches to the device."""

import torch

from pretrain.data.batches.batch import MicroBatch
from pretrain.data.batches.on_device import on_device


def test_every_batch_arrives_in_order_and_unchanged() -> None:
    batches = [
        MicroBatch(torch.full((2, 5), number, dtype=torch.int16), torch.arange(8).view(2, 4) > number)
        for number in range(3)
    ]
    found = list(on_device(iter(batches), torch.device("cpu")))
    assert len(found) == 3
    for batch, copy in zip(batches, found, strict=True):
        assert copy.tokens.dtype == torch.int64
        assert torch.equal(copy.tokens, batch.tokens.long())
        assert copy.counted is not None
        assert torch.equal(copy.counted, batch.counted)
        assert copy.positions is None
