"""The places of each weight's fp32 master and optimizer moments in a DeepSpeed checkpoint.

    engine            the master of one weight
    ZeRO-3            an equal range of it in every rank's file, the last ranges padded; weights one after another in
                      one flat tensor per sub-group
    ZeRO-1, ZeRO-2    the weights of a parameter group are laid end to end, with padding where DeepSpeed aligned the
    (also with bf16)  next one, and cut in equal slices, one in each rank's file; the last slices may be shorter
    stage 0, fp32     whole, with the model
    stage 0, half     whole, with the optimizer's state, one parameter group after another

The moments have the layout of the masters. One does not: at ZeRO-1 and 2 on a GPU, Muon's momentum is whole in the file of
each rank that steps any of the matrix.

Under tensor parallelism each rank of a group writes its own files (mp_rank_00, mp_rank_01, ...), in which "weight" means
the part that it holds. `shards.json` describes how the parts make the whole (pretrain/checkpoints/shard_metadata.py).

Found by experiment with DeepSpeed 0.19; docs/conversion.md has the details.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.shard_metadata import ShardMetadata, load_shard_metadata
from pretrain.checkpoints.stored.files import Span, open_stored, read_span, span
from pretrain.checkpoints.stored.tensor import Part, StoredTensor
from pretrain.errors import UserError
from pretrain.sharded.piece import Slice

MOMENTUM = "momentum_buffer"
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredWeight:
    """A weight's training state in a checkpoint.

    Attributes:
        master: the weight itself.
        moments: tensors of its shape, by the optimizer's name for them: exp_avg, exp_avg_sq, momentum_buffer. Empty where
            no step was taken.
        scalars: numbers that the optimizer keeps for it: step.
    """

    master: StoredTensor
    moments: dict[str, StoredTensor]
    scalars: dict[str, float]


@dataclass
class _Local:
    """What one tensor-parallel rank's files hold of a weight: spans with the index of their first element."""

    shape: tuple[int, ...]
    master: list[tuple[int, Span]]
    moments: dict[str, list[tuple[int, Span]]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Flat:
    """One flat tensor of one data-parallel rank, and the optimizer's state of it."""

    file: Path
    master: torch.Tensor
    state: dict[str, Any]

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.state.items() if isinstance(value, torch.Tensor) and value.dim()}

    @cached_property
    def scalars(self) -> dict[str, float]:
        """The numbers in the state, read from the file."""
        numbers = {key: value for key, value in self.state.items() if isinstance(value, int | float)}
        tensors = {
            key: value for key, value in self.state.items() if isinstance(value, torch.Tensor) and not value.dim()
        }
        return numbers | {key: float(read_span(span(self.file, value))[0]) for key, value in tensors.items()}


@dataclass(frozen=True)
class _Range:
    """Elements of a weight in a flat tensor: `count` from index `start` of the weight and `place` of the tensor on."""

    rank: int
    start: int
    place: int
    count: int


def master_weights(folder: Path) -> dict[str, StoredTensor]:
    """Find the fp32 master of every weight, as `stored_weights` does."""
    return {name: weight.master for name, weight in stored_weights(folder).items()}


def stored_weights(folder: Path, order: Sequence[Sequence[str]] = ()) -> dict[str, StoredWeight]:
    """Find every weight and its moments in the DeepSpeed files of a checkpoint, without reading any.

    Args:
        folder: the checkpoint's folder of DeepSpeed's files.
        order: names of the weights of each parameter group, for a checkpoint of stage 0 in fp32 by an older version, which
            does not say whose its moments are.

    Returns:
        Each weight by its name in the trained model, a tied weight once.

    Raises:
        UserError: the files are not those of one checkpoint.
    """
    metadata = load_shard_metadata(folder.parent)
    ranks = [_of_tensor_rank(folder, rank, metadata, order) for rank in range(metadata.tensor_ranks)]
    for rank in ranks:
        if rank.keys() != ranks[0].keys():
            odd = sorted(rank.keys() ^ ranks[0].keys())[0]
            raise UserError(
                f"{folder}: not every tensor-parallel rank's files hold {odd}: the files are not one checkpoint's."
            )
    return {name: _joined([rank[name] for rank in ranks], metadata.cut_along.get(name)) for name in ranks[0]}


def _joined(locals_: list[_Local], dim: int | None) -> StoredWeight:
    """Return one weight from what each tensor-parallel rank holds. dim None: each of them holds the same whole."""
    first = locals_[0]
    if dim is None:
        locals_, slices = [first], [Slice(first.shape)]
    else:
        lengths = [each.shape[dim] for each in locals_]
        ends = list(accumulate(lengths))
        shape = (*first.shape[:dim], ends[-1], *first.shape[dim + 1 :])
        slices = [Slice(shape, dim, end - length, end) for end, length in zip(ends, lengths, strict=True)]
    shape = slices[0].shape

    def tensor(spans: list[list[tuple[int, Span]]]) -> StoredTensor:
        pairs = zip(slices, spans, strict=True)
        return StoredTensor(shape, tuple(Part(part, start, where) for part, some in pairs for start, where in some))

    moments = {key: tensor([each.moments.get(key, []) for each in locals_]) for key in first.moments}
    return StoredWeight(tensor([each.master for each in locals_]), moments, first.scalars)


def _of_tensor_rank(
    folder: Path, tensor_rank: int, metadata: ShardMetadata, order: Sequence[Sequence[str]]
) -> dict[str, _Local]:
    """Return what one tensor-parallel rank holds of every weight."""
    files = f"*mp_rank_{tensor_rank:02d}"
    model_file = next(iter(sorted(folder.glob(f"{files}_model_states.pt"), key=_rank)), None)
    if model_file is None:
        raise UserError(f"{folder} holds no whole DeepSpeed checkpoint: there is no file {files}_model_states.pt.")
    model = open_stored(model_file)
    rank_files = sorted(folder.glob(f"{files}_optim_states.pt"), key=_rank)
    if not rank_files:
        return _stage0(model_file, model, metadata, order)
    contents = [open_stored(path) for path in rank_files]
    states = [content["optimizer_state_dict"] for content in contents]
    if len(states) != (ranks := _rank_count(states[0])):
        raise UserError(f"{folder} was written by {ranks} ranks but holds the optimizer states of {len(states)}.")
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    if "fp32_flat_groups" in states[0]:
        groups = _groups(rank_files, states, "fp32_flat_groups", "optimizer_state_dict")
        found = (_zero3(group, flats) for group, flats in zip(shapes, groups, strict=True))
        return {name: local for group in found for name, local in group}
    groups = _groups(rank_files, states, "single_partition_of_fp32_groups", "base_optimizer_state")
    paddings = states[0].get("param_alignment_paddings")
    offloaded = contents[0].get("ds_config", {}).get("zero_optimization", {}).get("offload_optimizer")
    whole_momentum = paddings is not None and not offloaded  # BF16_Optimizer's files name no paddings
    paddings = paddings or [[0] * len(group) for group in shapes]
    result: dict[str, _Local] = {}
    for group, flats, padding in zip(shapes, groups, paddings, strict=True):
        offsets = [0, *accumulate(prod(shape) + pad for shape, pad in zip(group.values(), padding, strict=True))]
        result.update(_zero12(group, offsets, flats, whole_momentum))
    return result


def _groups(files: list[Path], states: list[dict[str, Any]], masters: str, optimizer: str) -> list[list[_Flat]]:
    """Return the flat tensors of each group or sub-group, one of every rank."""
    by_rank = [
        [_Flat(file, flat, state[optimizer]["state"].get(number, {})) for number, flat in enumerate(state[masters])]
        for file, state in zip(files, states, strict=True)
    ]
    return [list(flats) for flats in zip(*by_rank, strict=True)]


def _zero3(shapes: _Shapes, flats: list[_Flat]) -> Iterator[tuple[str, _Local]]:
    place = 0
    for name, shape in shapes.items():
        length = ceil(prod(shape) / len(flats))
        ranges = [
            _Range(rank, rank * length, place, max(0, min(length, prod(shape) - rank * length)))
            for rank in range(len(flats))
        ]
        yield name, _local(shape, flats, ranges)
        place += length


def _zero12(
    shapes: _Shapes, offsets: list[int], flats: list[_Flat], whole_momentum: bool
) -> Iterator[tuple[str, _Local]]:
    """Yield the weights of a parameter group; `offsets` of each in the slices laid end to end."""
    ends = list(accumulate(flat.master.numel() for flat in flats))
    filled = [0] * len(flats)  # values in each rank's whole momentums so far
    for (name, shape), offset in zip(shapes.items(), offsets[:-1], strict=True):
        count, ranges = prod(shape), []
        for rank, (flat, end) in enumerate(zip(flats, ends, strict=True)):
            begin = end - flat.master.numel()
            first, last = max(offset, begin), min(offset + count, end)
            if first < last:
                ranges.append(_Range(rank, first - offset, first - begin, last - first))
        if sum(each.count for each in ranges) != count:
            raise UserError(
                f"{flats[0].file.parent} holds too few values of {name}: the files are not those of one checkpoint."
            )
        local = _local(shape, flats, ranges)
        if whole_momentum and MOMENTUM in local.moments:
            holder = flats[ranges[0].rank]
            where = span(holder.file, holder.moments[MOMENTUM], filled[ranges[0].rank], count)
            local.moments[MOMENTUM] = [(0, where)]
        for each in ranges:
            filled[each.rank] += count
        yield name, local


def _local(shape: tuple[int, ...], flats: list[_Flat], ranges: list[_Range]) -> _Local:
    """Return a weight of which the flat tensors, and moments of their layout, hold `ranges`."""
    held = [(flats[each.rank], each) for each in ranges if each.count]
    first = held[0][0]
    if any(flat.moments.keys() != first.moments.keys() or flat.scalars != first.scalars for flat, _ in held):
        raise UserError(
            f"{first.file.parent}: the ranks' optimizer states differ in kind: they are not one checkpoint's."
        )

    def spans(key: str | None) -> list[tuple[int, Span]]:
        return [
            (each.start, span(flat.file, flat.master if key is None else flat.moments[key], each.place, each.count))
            for flat, each in held
        ]

    return _Local(shape, spans(None), {key: spans(key) for key in first.moments}, first.scalars)


def _stage0(
    file: Path, model: dict[str, Any], metadata: ShardMetadata, order: Sequence[Sequence[str]]
) -> dict[str, _Local]:
    """Return the weights of stage 0: whole, with the model or, in half precision, with the optimizer's state."""
    optimizer = model["optimizer"]
    names = metadata.whole_masters or order
    if "fp32_groups" in optimizer:  # half precision: the model's tensors are working copies
        if len(names) != len(optimizer["fp32_groups"]):
            raise UserError(
                f"{file} holds masters without names: {file.parent.parent / 'shards.json'} is not this checkpoint's."
            )
        groups = zip(names, optimizer["fp32_groups"], strict=True)
        masters = {name: tensor for group, tensors in groups for name, tensor in zip(group, tensors, strict=True)}
        state = optimizer["optimizer_state_dict"]["state"]
    else:
        masters, state = _untied(file, model["module"]), optimizer["state"]
    found = {name: _Local(tuple(tensor.shape), [(0, span(file, tensor))]) for name, tensor in masters.items()}
    in_order = [name for group in names for name in group]
    if in_order and len(state) not in (0, len(in_order)):
        raise UserError(
            f"{file} holds the optimizer's states of {len(state)} weights, and the model has {len(in_order)}."
        )
    for number, name in enumerate(in_order):
        flat = _Flat(file, masters.get(name, torch.empty(0)), state.get(number, {}))
        if name not in found or any(moment.shape != flat.master.shape for moment in flat.moments.values()):
            raise UserError(
                f"{file} holds no moments that fit {name}: its weights are in another order than this run's."
            )
        found[name].moments = {key: [(0, span(file, moment))] for key, moment in flat.moments.items()}
        found[name].scalars = flat.scalars
    return found


def _untied(file: Path, module: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's tensors. Tied ones lie at the same place; the first name counts."""
    seen: set[Span] = set()
    result = {}
    for name, tensor in module.items():
        if (where := span(file, tensor)) not in seen:
            seen.add(where)
            result[name] = tensor
    return result


def _rank_count(state: dict[str, Any]) -> int:
    count = state["partition_count"]
    return max(count) if isinstance(count, list) else count


def _rank(path: Path) -> int:
    """Return the data-parallel rank in a DeepSpeed file name; files that only rank 0 writes carry none."""
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else 0
