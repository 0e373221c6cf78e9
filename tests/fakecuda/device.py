"""`torch.cuda` on the fake device: the functions that a torch without CUDA only has as stubs."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

# An H100, as the product's tables know it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
FREE_MEMORY = 64 << 30  # bytes, always
ALLOCATED_MEMORY = 1 << 30  # bytes, always: the memory of the device is not counted

_SYNC_DEBUG_MODES = {"default": 0, "warn": 1, "error": 2}


_numbers = itertools.count(1)  # of streams; 0 is the default one
_EVERY_TICKET = 2**63 - 1


class Stream:
    """A stream. Only asynchronous copies are late on it: they arrive when somebody waits for them (native/streams.cpp)."""

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None, **_: Any) -> None:
        self.number = next(_numbers) if number is None else number
        self.priority = priority
        self.cuda_stream = self.number

    @property
    def device(self) -> torch.device:
        """Return the current device: a process has one in this project."""
        return torch.device("cuda", torch.accelerator.current_device_index())

    def synchronize(self) -> None:
        """Let the host wait for everything on this stream."""
        torch.ops.fakecuda.wait_on_host(self.number, _EVERY_TICKET)

    def wait_stream(self, other: Stream) -> None:
        """Let the device wait for everything on `other`."""
        torch.ops.fakecuda.wait_on_device(other.number, _EVERY_TICKET)

    def wait_event(self, event: Event) -> None:
        """Let the device wait for an event."""
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that happens after what is on this stream by now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Return True, once everything on this stream has happened."""
        torch.ops.fakecuda.wait_on_host(self.number, _EVERY_TICKET)
        return True


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        del enable_timing, blocking, interprocess
        self._place = (0, 0)  # the number of the stream, and the ticket of the last copy before it

    def record(self, stream: Stream | None = None) -> None:
        """Take this place in a stream, by default in the current one."""
        self._place = ((stream or _current_stream()).number, torch.ops.fakecuda.last_ticket())

    def wait(self, stream: Stream | None = None) -> None:
        """Let the device wait for what is before this place."""
        torch.ops.fakecuda.wait_on_device(*self._place)

    def synchronize(self) -> None:
        """Let the host wait for what is before this place."""
        torch.ops.fakecuda.wait_on_host(*self._place)

    def query(self) -> bool:
        """Return True, once what is before this place has happened."""
        torch.ops.fakecuda.wait_on_host(*self._place)
        return True

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds between two events, which are not measured."""
        return 0.0


_default_stream = Stream(number=0)
_streams = threading.local()


def install() -> None:
    """Give `torch.cuda` the functions of a CUDA build. The library of the device must be loaded."""
    for name, replacement in _functions().items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.Stream = Stream  # type: ignore[misc,assignment]  # a stub in a torch without CUDA
    torch.cuda.Event = Event  # type: ignore[misc,assignment]  # the same
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]  # takes our streams
    torch.UntypedStorage.__new__ = _new_storage  # type: ignore[method-assign,assignment]  # knows no CUDA otherwise
    torch.cuda.nccl.version = lambda: (2, 28, 9)
    no_profiler: Any = SimpleNamespace(rangePushA=lambda message: 0, rangePop=lambda: 0)
    torch.cuda.nvtx._nvtx = no_profiler


def _functions() -> dict[str, Any]:
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: int(os.environ["FAKECUDA_DEVICES"]),
        "current_device": torch.accelerator.current_device_index,
        "set_device": _set_device,
        "_exchange_device": torch._C._accelerator_exchangeDevice,
        "_maybe_exchange_device": torch._C._accelerator_maybeExchangeDevice,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: torch.ops.fakecuda.synchronize(),
        "current_stream": _current_stream,
        "default_stream": lambda device=None: _default_stream,
        "stream": _in_stream,
        "set_stream": _set_stream,
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=_register_host, cudaHostUnregister=_unregister_host),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (FREE_MEMORY, PROPERTIES.total_memory),
        "memory_allocated": lambda device=None: ALLOCATED_MEMORY,
        "max_memory_allocated": lambda device=None: ALLOCATED_MEMORY,
        "memory_reserved": lambda device=None: ALLOCATED_MEMORY,
        "max_memory_reserved": lambda device=None: ALLOCATED_MEMORY,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        "reset_max_memory_allocated": lambda device=None: None,
        # One generator serves both devices: dropout on the device draws from the CPU's.
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "initial_seed": torch.initial_seed,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_sync_debug_mode": torch.ops.fakecuda.get_sync_debug_mode,
    }


def _set_device(device: torch.device | str | int) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index is not None and index >= 0:
        torch.accelerator.set_device_index(index)


def _current_stream(device: Any = None) -> Stream:
    stream: Stream = getattr(_streams, "current", _default_stream)
    return stream


def _set_stream(stream: Stream) -> None:
    _streams.current = stream
    torch.ops.fakecuda.set_stream(stream.number)


@contextmanager
def _in_stream(stream: Stream | None) -> Iterator[None]:
    before = _current_stream()
    _set_stream(stream or before)
    try:
        yield
    finally:
        _set_stream(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    torch.ops.fakecuda.set_sync_debug_mode(_SYNC_DEBUG_MODES[mode] if isinstance(mode, str) else mode)


def _register_host(address: int, size: int, flags: int) -> int:
    torch.ops.fakecuda.register_host(address, size)
    return 0


def _unregister_host(address: int) -> int:
    torch.ops.fakecuda.unregister_host(address)
    return 0


def _new_storage(kind: type[torch.UntypedStorage], *arguments: Any, **named: Any) -> torch.UntypedStorage:
    """Return a storage. One of the fake device is made as a tensor's: pickle and deepcopy ask for storages by themselves."""
    device = torch.device(named.get("device") or "cpu")
    if device.type != "cuda":
        return torch._C.StorageBase.__new__(kind, *arguments, **named)
    return torch.empty(arguments[0] if arguments else 0, dtype=torch.uint8, device=device).untyped_storage()
