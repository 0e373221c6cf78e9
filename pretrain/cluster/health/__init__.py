"""What one node must have before it trains. Every check gives findings, a sentence each; none means healthy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pretrain.cluster.health.gpus import SHARED_MEMORY, check_gpus, read_gpus
from pretrain.cluster.health.system import check_folder, check_limits, check_memory, check_scratch


def check_node(folder: Path, gpus: int | None, min_free_gb: float) -> Iterator[str]:
    """What is wrong with this node, the quickly found first.

    folder: of the run; it need not exist yet. gpus: how many there must be; None for as many as there are. min_free_gb:
    10^9 bytes that the folder's file system must have free.
    """
    yield from check_limits()
    yield from check_memory()
    yield from check_scratch()
    yield from check_folder(folder, min_free_gb)
    found, complaint = read_gpus()
    if complaint:
        yield complaint
    if gpus is not None and len(found) != gpus:
        yield f"{len(found)} GPUs are here and {gpus} are wanted"
    if found:
        yield from check_scratch(SHARED_MEMORY)
    yield from check_gpus(found)

    from pretrain.cluster.health.arithmetic import check_devices  # seconds to import

    yield from check_devices(len(found))
