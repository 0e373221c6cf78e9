"""The number of logits that the loss holds at a time."""

import pytest
import torch

from pretrain.engine.loss_chunk import agreed_chunk, chunk_for
from pretrain.model.loss import CHUNK_LOGITS

GB = 10**9


@pytest.mark.parametrize(
    ("free_gb", "exponent"), [(0, 25), (10, 25), (20, 25), (30, 26), (60, 27), (72, 27), (125, 28), (1000, 28)]
)
def test_a_chunk_grows_with_the_free_memory_between_its_bounds(free_gb: int, exponent: int) -> None:
    assert chunk_for(free_gb * GB) == 1 << exponent


def test_beyond_the_least_a_chunk_takes_at_most_a_twentieth_of_the_free_memory() -> None:
    for free_gb in range(14, 200):
        assert chunk_for(free_gb * GB) * 20 <= free_gb * GB / 20


def test_on_a_cpu_it_stays_what_it_was() -> None:
    assert agreed_chunk(torch.device("cpu")) == CHUNK_LOGITS == 1 << 25
