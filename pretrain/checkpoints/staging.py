"""Copies the content of a checkpoint to the host's memory: training changes the original while the copy is written."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


def host_copy(state: Any) -> Any:
    """Return a copy of `state` with all tensors on the CPU. Tensors that share memory share it in the copy too."""
    rest = io.BytesIO()
    pickler = _WithoutTensors(rest)
    pickler.dump(state)
    copied: dict[int, torch.UntypedStorage] = {}
    tensors = [_over(_copy_once(tensor.untyped_storage(), copied), tensor) for tensor in pickler.tensors]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    rest.seek(0)
    return _WithTensors(rest, tensors).load()


class _WithoutTensors(pickle.Pickler):
    """Pickles everything but tensors, for which it writes their numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _WithTensors(pickle.Unpickler):
    """Puts tensors where their numbers are."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]


def _copy_once(storage: torch.UntypedStorage, copied: dict[int, torch.UntypedStorage]) -> torch.UntypedStorage:
    key = storage._cdata  # torch.save also distinguishes storages by it
    if key not in copied:
        on_gpu = storage.device.type == "cuda"
        copied[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu).untyped_storage()
        copied[key].copy_(storage, non_blocking=on_gpu)
    return copied[key]


def _over(storage: torch.UntypedStorage, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the layout of `tensor` in `storage`."""
    copy = torch.empty(0, dtype=tensor.dtype)
    copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    vars(copy).update(vars(tensor))  # such as the names that DeepSpeed gives to tensors
    return copy.requires_grad_(tensor.requires_grad)
