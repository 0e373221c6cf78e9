"""Copies the content of a checkpoint to the host's memory: training changes the original while the copy is written."""

from __future__ import annotations

import io
import pickle
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 512  # bytes, as torch's allocators align tensors
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of this process


class Staging:
    """Host memory for the copy of one checkpoint after the other: allocated once, and pinned where there is a GPU.

    Pinned memory from torch's own pool is rounded up to powers of two and is never given back, so a piece for each tensor
    would take up to twice the size of the checkpoint. This is one piece of exactly that size.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def host_copy(self, state: Any) -> Any:
        """Return a copy of `state` with all tensors on the CPU. Tensors that share memory share it in the copy too.

        The copy is valid until the next call, which writes into the same memory.
        """
        rest = io.BytesIO()
        pickler = _WithoutTensors(rest)
        pickler.dump(state)
        storages = {_key(tensor): tensor.untyped_storage() for tensor in pickler.tensors}
        copies = self._copied(storages)
        tensors = [_over(copies[_key(tensor)], tensor) for tensor in pickler.tensors]
        rest.seek(0)
        return _WithTensors(rest, tensors).load()

    def _copied(self, storages: dict[int, torch.UntypedStorage]) -> dict[int, torch.UntypedStorage]:
        """Return a copy of each storage."""
        needed = sum(_aligned(storage.nbytes()) for storage in storages.values())
        if len(self._memory) < needed:
            self._memory = np.empty(0, np.uint8)  # the old piece is given back first
            self._memory = np.empty(needed, np.uint8)
            _pin(self._memory)
        copies: dict[int, torch.UntypedStorage] = {}
        start = 0
        for key, storage in storages.items():
            # A storage of its own over a part of the memory: torch.save writes whole storages.
            copies[key] = torch.from_numpy(self._memory[start : start + storage.nbytes()]).untyped_storage()
            copies[key].copy_(storage, non_blocking=storage.device.type == "cuda")
            start += _aligned(storage.nbytes())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # torch.save also distinguishes storages by it


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pin(memory: NDArray[np.uint8]) -> None:
    """Register the memory with the CUDA driver where there is a GPU, as long as it lives: copies then run at full speed.

    Where the driver refuses, copies are slower and no less right.
    """
    if not torch.cuda.is_available():
        return
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    if int(runtime.cudaHostRegister(address, memory.nbytes, _PORTABLE)) == 0:
        # Every storage over a part of it keeps it alive. At the end of the process the driver goes first.
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False


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


def _over(storage: torch.UntypedStorage, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the layout of `tensor` in `storage`."""
    copy = torch.empty(0, dtype=tensor.dtype)
    copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    vars(copy).update(vars(tensor))  # such as the names that DeepSpeed gives to tensors
    return copy.requires_grad_(tensor.requires_grad)
