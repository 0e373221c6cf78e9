"""Checks of one node before it trains. Each check yields a sentence for each fault, and none if the node is healthy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pretrain.cluster.health.gpus import SHARED_MEMORY, check_gpus, read_gpus
from pretrain.cluster.health.system import check_folder, check_limits, check_memory, check_scratch


def check_node(folder: Path, gpus: int | None, min_free_gb: float) -> Iterator[str]:
    """Yield what is wrong with this node. The fastest checks come first.

    Args:
        folder: the run folder, which need not exist yet.
        gpus: how many GPUs there must be. None accepts any number.
        min_free_gb: 10^9 bytes that the folder's file system must have free.
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
