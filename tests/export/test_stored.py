"""Weights that lie in several files come back whole, block by block."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.export import stored
from pretrain.export.safetensors_files import write_weights
from pretrain.export.stored import SideBySide, Span, StoredWeight, one_below_the_other


def store(folder: Path, values: torch.Tensor, cuts: list[int]) -> StoredWeight:
    """Write `values` to one file for each of the stretches between `cuts`, each after a few other bytes."""
    spans = []
    for number, part in enumerate(np.split(values.flatten().numpy(), cuts)):
        path = folder / f"{len(list(folder.iterdir()))}_{number}"
        path.write_bytes(b"header" + part.tobytes())
        spans.append(Span(path, 6, part.size))
    return StoredWeight(tuple(values.shape), tuple(spans))


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_columns_of_several_ranks_are_put_side_by_side(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(stored, "_BLOCK", block)
    whole = torch.randn(5, 9)
    columns = zip(whole.split([3, 2, 4], 1), ([4], [], [1, 19]), strict=True)
    parts = [store(tmp_path, part.contiguous(), cuts) for part, cuts in columns]
    joined = SideBySide(tuple(parts))
    assert joined.shape == (5, 9)
    assert torch.equal(joined(), whole)


@pytest.mark.parametrize("whole", [torch.randn(7, 3), torch.randn(7)], ids=["matrix", "bias"])
def test_rows_of_several_ranks_are_put_one_below_the_other(tmp_path: Path, whole: torch.Tensor) -> None:
    parts = [store(tmp_path, part, [1]) for part in whole.split([3, 4])]
    joined = one_below_the_other(parts)
    assert joined.shape == tuple(whole.shape)
    assert torch.equal(joined(), whole)


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    part = store(tmp_path, torch.randn(4, 2), [])
    file = part.spans[0].file
    file.write_bytes(file.read_bytes()[:-1])
    for weight in (part, SideBySide((part, part))):
        with pytest.raises(UserError, match=f"{file} ends before"):
            weight()


def test_values_that_a_precision_does_not_reach_are_named(tmp_path: Path) -> None:
    """float16 ends at 65,504; 70,000 would be infinity there."""
    wide = {"head": lambda: torch.tensor([1.0, 70_000.0])}
    assert write_weights(tmp_path, wide, {"head": (2,)}, torch.bfloat16) == 1
    with pytest.raises(UserError, match=r"head holds values up to 70000, and torch\.float16 ends at 65504"):
        write_weights(tmp_path, wide, {"head": (2,)}, torch.float16)
