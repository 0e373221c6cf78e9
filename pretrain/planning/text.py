"""Predictions as lines and tables for the person who queues a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain.planning.cluster import ATTENTION, LINKS, PRODUCTS, ROOM, STREAMING, WHOLE_STEPS, Cluster
from pretrain.planning.memory import Memory
from pretrain.planning.search import Prediction
from pretrain.planning.step_time import is_compiled

_DAY_S = 86_400.0


def describe_memory(memory: Memory) -> str:
    """Return the memory of one rank in a line: the sum, and its parts."""
    text = f"{size_text(memory.device_bytes)} per rank: {_parts(memory.device)}"
    return text + (f"; on the host {_parts(memory.host)}" if memory.host else "")


def describe_prediction(prediction: Prediction, cluster: Cluster, largest: int | None) -> str:
    """Return the lines about a run on a cluster.

    Args:
        prediction: of the run.
        cluster: its machines.
        largest: the largest micro-batch that fits in this layout, None if none does.
    """
    shape, time = prediction.shape, prediction.time
    config, data = shape.config, shape.config.data
    room = cluster.gpu.memory_bytes
    verdict = "fits" if prediction.fits(cluster) else "DOES NOT FIT"
    lines = {
        "run": f"{config.name}: {shape.parameters / 1e9:.3g}B parameters, {data.largest_batch} sequences of "
        f"{data.seq_len:,} tokens a step",
        "cluster": f"{cluster.nodes} nodes x {cluster.gpus_per_node} {cluster.name.upper()}, {cluster.network:g} Gbit/s for "
        "each GPU between nodes",
        "layout": f"{layout_of(prediction)}, {shape.accumulation_steps} micro-batches a step, blocks "
        + ("compiled" if is_compiled(config) else "eager"),
        "memory": f"{size_text(prediction.memory.device_bytes)} of {size_text(room)} a GPU: {verdict} ({1 - ROOM:.0%} left free)",
        **{f"  {name}": size_text(size) for name, size in prediction.memory.device.items()},
        **{f"  host: {name}": size_text(size) for name, size in prediction.memory.host.items()},
        "largest": f"micro-batch {largest} in this layout" if largest else "no micro-batch fits in this layout",
        "step": f"{time.seconds:.3g} s: "
        + ", ".join(f"{name} {seconds:.2g} s" for name, seconds in time.parts.items()),
        "speed": f"{time.tokens_per_s:,.0f} tokens/s, {time.tokens_per_s * _DAY_S / 1e9:.3g}B tokens a day, MFU {time.mfu:.0%}",
        "traffic": f"{size_text(time.sent_bytes)} sent by each GPU in a step",
        "whole run": f"{_tokens(prediction) / 1e9:.3g}B tokens in {_days(prediction):.3g} days, "
        f"{_days(prediction) * 24 * cluster.gpus:,.0f} GPU hours",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def assumptions(cluster: Cluster) -> str:
    """Return what the times rest on."""
    gpu = cluster.gpu
    return (
        f"The times are a roofline, not a measurement. It takes {PRODUCTS:.0%} of the GPU's peak for matrix products, "
        f"{ATTENTION:.0%} for attention, {STREAMING:.0%} of {gpu.bandwidth / 1e12:g} TB/s for other kernels, {LINKS:.0%} of "
        f"{gpu.link / 1e9:g} GB/s within a node and of {cluster.network:g} Gbit/s between nodes, and {WHOLE_STEPS:.0%} of "
        "all that in whole steps. Memory leaves out what CUDA and NCCL take for themselves."
    )


def table_of(found: Sequence[Prediction], rows: int) -> str:
    """Return the first predictions as an aligned table."""
    head = ("layout", "GB", "step", "tokens/s", "MFU", "days")
    cells = [
        (
            layout_of(each),
            f"{each.memory.device_bytes / 1e9:.1f}",
            f"{each.time.seconds:.3g} s",
            f"{each.time.tokens_per_s:,.0f}",
            f"{each.time.mfu:.0%}",
            f"{_days(each):.3g}",
        )
        for each in found[:rows]
    ]
    return _aligned([head, *cells])


def layout_of(prediction: Prediction) -> str:
    """Return the layout of a run in a few words."""
    shape, config = prediction.shape, prediction.shape.config
    words = [f"ZeRO-{shape.zero_stage}", f"micro-batch {config.data.micro_batch_size}"]
    words += [f"tensor {config.parallel.tensor}"] * (config.parallel.tensor > 1)
    words += [f"sequence {config.parallel.sequence}"] * (config.parallel.sequence > 1)
    if config.activation_checkpointing != "off":
        words.append(f"{config.activation_checkpointing} recomputation")
    if shape.optimizer_on_cpu:
        words.append("optimizer on the CPU")
    return ", ".join(words)


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    return "\n".join(
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))))
        for row in rows
    )


def _tokens(prediction: Prediction) -> float:
    config = prediction.shape.config
    return config.tokens_after(config.total_steps)


def _days(prediction: Prediction) -> float:
    return _tokens(prediction) / prediction.time.tokens_per_s / _DAY_S


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())


def size_text(size: float) -> str:
    """Return a number of bytes with three digits and its unit, such as 1.25 GB or 27 MB."""
    return f"{size / 1e9:.3g} GB" if size >= 0.9995e9 else f"{size / 1e6:.3g} MB"
