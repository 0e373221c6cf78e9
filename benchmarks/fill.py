"""Measure the cost of drawing a LLaMA-7B's initial weights on each of R ranks, without starting them.

The pieces of one rank after another are filled, weight by weight, into one buffer of the size of the largest. Blocks
have equal shapes, so some are filled, and counted for all. Seconds are one thread's processor time, so that other work on
the machine hardly counts. Each case has a process of its own; its peak is the rise of resident memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from benchmarks.table import render
from pretrain.model.layout import Weight, describe_model
from pretrain.sharded.draws import Constant, Draw, GeneralizedGaussian, Normal, TruncatedNormal, Uniform, fill_slice_
from pretrain.sharded.piece import Slice

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
STD = 0.02
RANKS = 8  # where distributions and tensor parallelism are compared
CUT_DIM = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}  # as DeepSpeed's AutoTP cuts a LLaMA


@dataclass(frozen=True)
class FillCase:
    """ZeRO-3 on `ranks` ranks, `tensor` of which share a tensor-parallel cut."""

    draw: Draw
    ranks: int
    tensor: int = 1


@dataclass(frozen=True)
class Cost:
    """The cost of a case.

    Attributes:
        seconds: Of each rank.
        elements: The number that all ranks own together.
        column_seconds: The part of the seconds of all ranks that went into slices of columns.
        column_elements: The number of elements in them.
        buffer: Bytes of the largest piece.
        peak: Bytes.
    """

    seconds: list[float]
    elements: float
    column_seconds: float
    column_elements: float
    buffer: int
    peak: int


def bench_fill(world_sizes: tuple[int, ...], blocks: int) -> str:
    """Return a table: ranks, then distributions, then tensor parallelism. `blocks` of the model's 32 are filled."""
    weights, cases = _weights(), _cases(world_sizes)
    rows = []
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        costs = pool.imap(partial(_measure, weights, blocks), cases)
        for case, cost in zip(cases, tqdm(costs, total=len(cases), desc="cases"), strict=True):
            rows.append(_row(case, cost))
    header = [
        *("distribution", "ranks", "of them tensor-parallel", "rank 0 s", "slowest rank s", "ns per element"),
        *("in column slices", "largest piece MiB", "peak MiB"),
    ]
    return render(header, rows)


def _cases(world_sizes: tuple[int, ...]) -> list[FillCase]:
    others = [TruncatedNormal(STD), Uniform(STD), *(GeneralizedGaussian(STD, shape) for shape in (1.0, 1.5))]
    return [
        *(FillCase(Normal(STD), ranks) for ranks in world_sizes),
        *(FillCase(draw, RANKS) for draw in others),
        *(FillCase(Normal(STD), RANKS, tensor) for tensor in (2, 4, 8)),
    ]


def _row(case: FillCase, cost: Cost) -> tuple:
    in_columns = 1e9 * cost.column_seconds / cost.column_elements if cost.column_elements else "-"
    per_element = 1e9 * sum(cost.seconds) / cost.elements
    sizes = cost.buffer / 2**20, cost.peak / 2**20
    worst = max(cost.seconds)
    return case.draw.description, case.ranks, case.tensor, cost.seconds[0], worst, per_element, in_columns, *sizes


def _weights() -> list[Weight]:
    with torch.device("meta"), no_init_weights():
        return describe_model(LlamaForCausalLM(LLAMA_7B))


def _measure(weights: list[Weight], blocks: int, case: FillCase) -> Cost:
    torch.set_num_threads(1)
    sampled = [weight for weight in weights if weight.layer is None or weight.layer <= blocks]
    largest = max(count for weight in sampled for *_, count in [_piece(weight, case, 0)])
    fill_slice_(torch.empty(2000), case.draw, 0, "warm-up", Slice((1000, 3), 1, 0, 2), 0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before, buffer = _resident("VmRSS"), torch.empty(largest)
    seconds = [0.0] * case.ranks
    elements = column_seconds = column_elements = 0.0
    for rank in range(case.ranks):
        for weight in sampled:
            part, start, count = _piece(weight, case, rank)
            draw = Constant(1.0) if weight.role == "norm" else case.draw
            began = time.thread_time()
            fill_slice_(buffer[:count], draw, 0, weight.name, part, start)
            times = 1 if weight.layer is None else LLAMA_7B.num_hidden_layers / blocks
            spent = times * (time.thread_time() - began)
            seconds[rank] += spent
            elements += times * count
            if part.dim == 1:
                column_seconds += spent
                column_elements += times * count
    return Cost(seconds, elements, column_seconds, column_elements, 4 * largest, _resident("VmHWM") - before)


def _piece(weight: Weight, case: FillCase, rank: int) -> tuple[Slice, int, int]:
    """Return the part of rank `rank`: a slice, the first element in it and their number. Consecutive ranks share a cut."""
    dim = CUT_DIM.get(weight.role) if case.tensor > 1 else None
    if dim is None:
        part = Slice(weight.shape)
    else:
        length = weight.shape[dim] // case.tensor
        number = rank % case.tensor
        part = Slice(weight.shape, dim, number * length, (number + 1) * length)
    share = ceil(part.numel / (case.ranks // case.tensor))
    start = min(part.numel, rank // case.tensor * share)
    return part, start, min(share, part.numel - start)


def _resident(kind: str) -> int:
    """Return the bytes of this process in memory (VmRSS), or the most there ever were (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(status[kind].split()[0])
