"""The places of the fp32 master of each weight in a DeepSpeed checkpoint.

    engine            the master of one weight
    ZeRO-3            an equal range of it in every rank's file, the last ranges padded; weights one after another in
                      one flat tensor per sub-group
    ZeRO-1, ZeRO-2    the weights of a parameter group are laid end to end, with padding where DeepSpeed aligned the
    (also with bf16)  next one, and cut in equal slices, one in each rank's file; the last slices may be shorter
    stage 0, fp32     whole, with the model
    stage 0, half     whole, with the optimizer's state, one parameter group after another

Under tensor parallelism each rank of a group writes its own files (mp_rank_00, mp_rank_01, ...), in which "weight" means
the part that it holds. `shards.json` describes how the parts make the whole (pretrain/checkpoints/shard_metadata.py).

Found by experiment with DeepSpeed 0.19; docs/conversion.md has the details.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.shard_metadata import ShardMetadata, load_shard_metadata
from pretrain.errors import UserError
from pretrain.export.stored import SideBySide, Span, StoredWeight, one_below_the_other, open_stored, span

# One group of parameters on all ranks: (file, flat tensor of this rank), in rank order.
_Slices = list[tuple[Path, torch.Tensor]]


def master_weights(folder: Path) -> dict[str, StoredWeight | SideBySide]:
    """Find every weight in the DeepSpeed files of a checkpoint, without reading any.

    Args:
        folder: The checkpoint's folder of DeepSpeed's files.

    Returns:
        Each weight by its name in the trained model, a tied weight once; calling it reads it, float32.

    Raises:
        UserError: If the files are not those of one checkpoint.
    """
    metadata = load_shard_metadata(folder.parent)
    ranks = [_parts_of_rank(folder, rank, metadata) for rank in range(metadata.tensor_ranks)]
    return {name: _join([rank[name] for rank in ranks], metadata.cut_along.get(name)) for name in ranks[0]}


def _join(parts: list[StoredWeight], dimension: int | None) -> StoredWeight | SideBySide:
    """Return one weight from the parts of the tensor-parallel ranks. dimension None: each of them holds the same whole."""
    if dimension is None:
        return parts[0]
    return one_below_the_other(parts) if dimension == 0 else SideBySide(tuple(parts))


def _parts_of_rank(folder: Path, tensor_rank: int, metadata: ShardMetadata) -> dict[str, StoredWeight]:
    """Return the part of every weight that one tensor-parallel rank holds."""
    files = f"*mp_rank_{tensor_rank:02d}"
    model_file = next(iter(sorted(folder.glob(f"{files}_model_states.pt"), key=_rank)), None)
    if model_file is None:
        raise UserError(f"{folder} holds no whole DeepSpeed checkpoint: there is no file {files}_model_states.pt.")
    model = open_stored(model_file)
    rank_files = sorted(folder.glob(f"{files}_optim_states.pt"), key=_rank)
    states = [open_stored(path)["optimizer_state_dict"] for path in rank_files]
    if not states and metadata.whole_masters:
        return dict(_whole_masters(model_file, model["optimizer"]["fp32_groups"], metadata.whole_masters))
    if not states:
        return dict(_whole(model_file, model["module"]))
    if len(states) != (ranks := _rank_count(states[0])):
        raise UserError(f"{folder} was written by {ranks} ranks but holds the optimizer states of {len(states)}.")
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    if "fp32_flat_groups" in states[0]:
        return dict(_zero3(shapes, _groups(rank_files, [state["fp32_flat_groups"] for state in states])))
    groups = _groups(rank_files, [state["single_partition_of_fp32_groups"] for state in states])
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    return dict(_zero12(shapes, groups, paddings))


def _whole(file: Path, module: dict[str, torch.Tensor]) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the weights of stage 0: the model's own tensors. Tied ones lie at the same place; the first name counts."""
    seen: set[Span] = set()
    for name, tensor in module.items():
        where = span(file, tensor)
        if where not in seen:
            seen.add(where)
            yield name, StoredWeight(tuple(tensor.shape), (where,))


def _whole_masters(
    file: Path, groups: list[list[torch.Tensor]], names: list[list[str]]
) -> Iterator[tuple[str, StoredWeight]]:
    """Yield the weights of stage 0 in half precision: the optimizer's masters; the model's tensors are working copies."""
    for tensors, group in zip(groups, names, strict=True):
        for name, tensor in zip(group, tensors, strict=True):
            yield name, StoredWeight(tuple(tensor.shape), (span(file, tensor),))


def _zero3(shapes: list[dict], groups: list[_Slices]) -> Iterator[tuple[str, StoredWeight]]:
    for group, slices in zip(shapes, groups, strict=True):
        offset = 0
        for name, shape in group.items():
            length = ceil(prod(shape) / len(slices))
            owned = [max(0, min(length, prod(shape) - rank * length)) for rank in range(len(slices))]
            yield (
                name,
                StoredWeight(
                    shape, tuple(span(*part, offset, count) for part, count in zip(slices, owned, strict=True))
                ),
            )
            offset += length


def _zero12(shapes: list[dict], groups: list[_Slices], paddings: list[list[int]]) -> Iterator[tuple[str, StoredWeight]]:
    for group, slices, padding in zip(shapes, groups, paddings, strict=True):
        offset = 0
        for (name, shape), pad in zip(group.items(), padding, strict=True):
            yield name, StoredWeight(shape, tuple(_cut(slices, offset, prod(shape))))
            offset += prod(shape) + pad


def _cut(slices: _Slices, start: int, count: int) -> Iterator[Span]:
    """Yield the places of elements `start` to `start + count` of the slices laid end to end."""
    for file, flat in slices:
        inside = max(0, min(count, flat.numel() - start))
        if inside:
            yield span(file, flat, start, inside)
        start, count = max(0, start - flat.numel()), count - inside
    if count:
        raise UserError(f"{file.parent} holds {count} values too few: the files are not those of one checkpoint.")


def _groups(files: list[Path], flats_by_rank: list[Iterable[torch.Tensor]]) -> list[_Slices]:
    """Regroup the flat tensors that each rank holds: for each group, one of every rank."""
    return [list(zip(files, flats, strict=True)) for flats in zip(*flats_by_rank, strict=True)]


def _rank_count(state: dict[str, Any]) -> int:
    count = state["partition_count"]
    return max(count) if isinstance(count, list) else count


def _rank(path: Path) -> int:
    """Return the data-parallel rank in a DeepSpeed file name; files that only rank 0 writes carry none."""
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0
