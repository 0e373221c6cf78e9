"""Counts what would make the host wait for a GPU, on a CPU.

DeepSpeed is made to believe that its accelerator works asynchronously, as CUDA does, so it takes the way through its code
that it takes on a GPU. All tensors count as a device's, but for copies that `.cpu()` has made. Counted are the waits for
streams, events and the device, `.cpu()`, and ops whose result depends on values (the reading of a number, `nonzero`).
Not seen are copies from memory that is not pinned, and waits inside kernels and collectives.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator, real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.faults import replace

_READING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
_NOT_THE_PLACE = ("tests/support/spy.py", "/torch/", "contextlib.py", "deepspeed/utils/nvtx.py")


class Waits(TorchDispatchMode):
    """A context that counts the waits by their place. One for each process, entered at most once at a time.

    Attributes:
        places: how often the host has waited, by "kind: file:function".
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._copies: dict[int, torch.Tensor] = {}  # on the host, by id

    def __enter__(self) -> Any:
        self.places.clear()
        self._copies.clear()
        _Stream.seen_by = _Event.seen_by = _Asynchronous.seen_by = self
        self._cpu, self._tolist = torch.Tensor.cpu, torch.Tensor.tolist
        replace(torch.Tensor, "cpu", lambda tensor, *given, **more: self._copied(tensor))
        replace(torch.Tensor, "tolist", lambda tensor: self._listed(tensor))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        replace(torch.Tensor, "cpu", self._cpu)
        replace(torch.Tensor, "tolist", self._tolist)
        _Stream.seen_by = _Event.seen_by = _Asynchronous.seen_by = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _READING and id(args[0]) not in self._copies:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, kind: str) -> None:
        """Count one wait at the place from which it was called."""
        for frame in reversed(traceback.extract_stack()[:-2]):
            if not any(part in frame.filename for part in _NOT_THE_PLACE):
                self.places[f"{kind}: {frame.filename.rpartition('/')[2]}:{frame.name}"] += 1
                return

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        self.note("cpu")
        copy = tensor.clone()
        self._copies[id(copy)] = copy
        return copy

    def _listed(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self._copies:
            self.note("tolist")
        return self._tolist(tensor)


class _Seen:
    seen_by: Waits | None = None

    def wait(self, kind: str) -> None:
        if self.seen_by is not None:
            self.seen_by.note(kind)


class _Stream(_Seen):
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None:
        self.wait("stream")

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event(_Seen):
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.wait("event")

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Asynchronous(_Seen, CPU_Accelerator):
    Stream, Event = _Stream, _Event

    def is_synchronized_device(self) -> bool:
        return False

    def resolves_data_dependency(self) -> bool:
        return False

    def synchronize(self, device_index: int | None = None) -> None:
        self.wait("device")

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> _Stream:
        return _Stream()

    default_stream = current_stream


def pretend_to_be_asynchronous() -> None:
    """Let DeepSpeed take the CPU for a device that works beside the host. For the rest of the process."""
    assert isinstance(get_accelerator(), CPU_Accelerator)
    real_accelerator.set_accelerator(_Asynchronous())
    replace(torch.Tensor, "record_stream", lambda tensor, stream: None)
