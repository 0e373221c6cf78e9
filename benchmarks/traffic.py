"""Count the bytes that a rank receives from the others, at torch's own collectives, whichever code calls them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How often a rank receives the tensors of a collective in a ring: an all-reduce is a reduce-scatter and an all-gather.
_PASSES = {"allgather_": 1, "_allgather_base_": 1, "broadcast_": 1, "allreduce_": 2, "barrier": 0}


class Traffic(TorchDispatchMode):
    """A context that counts the collectives of this process and the bytes they bring it.

    Among n ranks a rank receives (n - 1) / n of an all-gather's output and of a broadcast's tensor (the mean over the
    ranks, of which one sends), and twice that share of an all-reduce's tensor. Traffic of algorithms other than the ring is
    not seen. An unknown collective raises NotImplementedError, so that none is left out.

    Attributes:
        received: Bytes.
        collectives: How many there were, barriers not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received, self.collectives = 0.0, 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name not in _PASSES:
            raise NotImplementedError(f"the traffic of the collective {name} is not known")
        group = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
        ranks = dist.ProcessGroup.unbox(group).size()
        size = sum(tensor.nbytes for tensor in tree_leaves(args[0]))
        self.received += _PASSES[name] * size * (ranks - 1) / ranks
        self.collectives += _PASSES[name] > 0
