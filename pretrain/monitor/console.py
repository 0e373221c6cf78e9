"""The line that a run prints at each interval, and the memory that it has used."""

from __future__ import annotations

import resource
from datetime import timedelta

import torch

from pretrain.monitor.throughput import Pace


def progress_line(step: int, total: int, loss: float, grad_norm: float | None, lr: float, pace: Pace) -> str:
    """Return step, loss, gradient norm, learning rate, speed, share of time waiting for data, and time left."""
    mfu = f"mfu {pace.mfu:.1%}  " if pace.mfu is not None else ""
    norm = "-" if grad_norm is None else f"{grad_norm:.3f}"
    return (
        f"step {step:>7,}/{total:,}  loss {loss:.4f}  grad norm {norm}  lr {lr:.2e}  "
        f"{pace.tokens_per_s:,.0f} tokens/s  {mfu}data wait {pace.data_wait:.1%}  "
        f"ETA {timedelta(seconds=round(pace.remaining_s))}"
    )


def memory_bytes() -> int:
    """Return the peak memory of this rank so far: of the GPU's allocator, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
