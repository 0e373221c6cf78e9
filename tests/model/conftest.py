"""Fixtures for the tests of several parts of the model."""

from __future__ import annotations

import pytest
import torch.nn.attention.flex_attention
from torch.nn.attention.flex_attention import flex_attention

from pretrain.model import attention


@pytest.fixture
def flex_attention_with_gradients(monkeypatch) -> None:
    """Let flex_attention run on the CPU as torch computes it where nothing is compiled: its kernels there have no gradients.

    torch refuses gradients on CPUs altogether, because of those kernels.
    """
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
