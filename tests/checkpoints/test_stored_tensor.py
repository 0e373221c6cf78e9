"""Ranges of tensors that lie in the files of several ranks come back as they are in the full tensor, block by block."""

import random
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.stored import Part, Span, StoredTensor, tensor
from pretrain.errors import UserError
from pretrain.sharded.piece import Slice

WHOLES = {"matrix": torch.randn(7, 12), "bias": torch.randn(12), "one number": torch.randn(())}


def slices(whole: torch.Tensor, dim: int | None, lengths: list[int]) -> list[Slice]:
    if dim is None:
        return [Slice(tuple(whole.shape))]
    return [Slice(tuple(whole.shape), dim, first, last) for first, last in pairwise(accumulate([0, *lengths]))]


def store(folder: Path, whole: torch.Tensor, cuts: list[Slice], ranks: int) -> StoredTensor:
    """Write each slice of `whole`, flat, to `ranks` files of unequal stretches, each after a few other bytes."""
    parts = []
    for number, cut in enumerate(cuts):
        flat = cut.of(whole).flatten()
        places = sorted(random.choices(range(flat.numel() + 1), k=ranks - 1))
        for rank, (first, last) in enumerate(pairwise([0, *places, flat.numel()])):
            path = folder / f"{number}_{rank}_{len(list(folder.iterdir()))}"
            path.write_bytes(b"header" + flat[first:last].numpy().tobytes())
            parts.append(Part(cut, first, Span(path, 6, last - first)))
    return StoredTensor(tuple(whole.shape), tuple(parts))


CUTS = {
    "matrix": [(None, []), (0, [3, 4]), (0, [2, 2, 3]), (1, [6, 6]), (1, [3, 2, 7])],
    "bias": [(None, []), (0, [5, 7]), (0, [4, 4, 4])],
    "one number": [(None, [])],
}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", CUTS)
def test_any_range_of_any_slice_is_read_from_any_other_slices(tmp_path, monkeypatch, name: str, block: int) -> None:
    monkeypatch.setattr(tensor, "_BLOCK", block)
    monkeypatch.setattr(tensor, "_WORTH_SEEKING", 5)
    random.seed(1)
    whole = WHOLES[name]
    for stored_cut in CUTS[name]:
        stored = store(tmp_path, whole, slices(whole, *stored_cut), ranks=3)
        assert torch.equal(stored(), whole)
        for wanted in (cut for wanted_cut in CUTS[name] for cut in slices(whole, *wanted_cut)):
            flat = wanted.of(whole).flatten()
            for _ in range(4):
                first, last = sorted(random.choices(range(flat.numel() + 1), k=2))
                room = torch.full((flat.numel() + 2,), 9.0)
                stored.read_into(room[1 + first : 1 + last], wanted, first)
                expected = torch.full_like(room, 9.0)
                expected[1 + first : 1 + last] = flat[first:last]
                assert torch.equal(room, expected)


def test_only_the_wanted_range_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensor, "_WORTH_SEEKING", 4)
    whole, seen = WHOLES["matrix"], []
    stored = store(tmp_path, whole, slices(whole, None, []), ranks=2)
    read = tensor.read_span
    monkeypatch.setattr(tensor, "read_span", lambda where, *out: seen.append(where.count) or read(where, *out))
    out = torch.empty(7 * 4)
    stored.read_into(out, Slice((7, 12), 1, 4, 8), 0)
    assert torch.equal(out.view(7, 4), whole[:, 4:8])
    assert sum(seen) == out.numel()


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    whole = WHOLES["matrix"]
    stored = store(tmp_path, whole, slices(whole, 1, [6, 6]), ranks=1)
    file = stored.parts[1].span.file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file} ends before"):
        stored()


def test_values_that_no_part_holds_are_counted(tmp_path: Path) -> None:
    whole = WHOLES["matrix"]
    stored = store(tmp_path, whole, slices(whole, 1, [6, 6]), ranks=1)
    with pytest.raises(UserError, match=r"shape \(7, 12\) lacks 42 of its values"):
        StoredTensor(stored.shape, stored.parts[:1])()
