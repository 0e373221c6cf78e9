"""Weights are written in the precision that was asked for, or it is said that it does not hold them."""

from pathlib import Path

import pytest
import torch

from pretrain.errors import UserError
from pretrain.export.safetensors_files import write_weights


def test_values_that_a_precision_does_not_reach_are_named(tmp_path: Path) -> None:
    """float16 ends at 65,504; 70,000 would be infinity there."""
    wide = {"head": lambda: torch.tensor([1.0, 70_000.0])}
    assert write_weights(tmp_path, wide, {"head": (2,)}, torch.bfloat16) == 1
    with pytest.raises(UserError, match=r"head holds values up to 70000, and torch\.float16 ends at 65504"):
        write_weights(tmp_path, wide, {"head": (2,)}, torch.float16)
