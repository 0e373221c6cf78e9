"""Tokens per second, time left, and model FLOPs utilization by a closed formula.

FLOPs per token, forward and backward: 6 per weight of the matrices that multiply activations (embedding look-ups
excluded, the head included), plus 12 · layers · attention width · sequence length for the scores and the weighted sum of
full (not halved for causality) attention; Chowdhery et al. 2022 (PaLM), appendix B. Recomputed activations do not
count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from pretrain.model.layout import Weight


class _Peaks(NamedTuple):
    """Dense peaks (without sparsity) of one device in FLOP/s: bf16 and fp16, TF32 and fp32 products."""

    half: float
    tf32: float
    fp32: float


# From the vendors' data sheets, by a part of the device's name. The first that fits counts.
_PEAKS = {
    "H100 PCIe": _Peaks(756e12, 378e12, 51e12),
    "H100 NVL": _Peaks(835e12, 417e12, 60e12),
    "H200 NVL": _Peaks(835e12, 417e12, 60e12),
    "H100": _Peaks(989e12, 494e12, 67e12),
    "H200": _Peaks(989e12, 494e12, 67e12),
    "B200": _Peaks(2250e12, 1125e12, 75e12),
    "A100": _Peaks(312e12, 156e12, 19.5e12),
    "MI300X": _Peaks(1307e12, 653e12, 163e12),
}


def flops_per_token(weights: list[Weight], config: PreTrainedConfig, seq_len: int) -> float:
    """Return the FLOPs that training spends on one token of a sequence of `seq_len` tokens."""
    multiplied = sum(w.numel for w in weights if w.in_block_matrix or w.role in ("head", "projection"))
    if not any(w.role == "head" for w in weights):  # tied: the embedding serves as head
        multiplied += sum(w.numel for w in weights if w.role == "embed")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    return 6.0 * multiplied + attention


def peak_flops(precision: str) -> float | None:
    """Return the dense peak of this rank's GPU in FLOP/s for a run in `precision`: bf16, fp16 or fp32.

    A run in fp32 is held against the peak of TF32 where torch may compute in it, else against that of fp32. None on a CPU
    or an unknown device: no MFU is reported there.
    """
    return peak_of(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None


def peak_of(device: str, precision: str) -> float | None:
    """Return what `peak_flops` returns on the device of that name. None for an unknown one."""
    peaks = next((peaks for part, peaks in _PEAKS.items() if part in device), None)
    if peaks is None or precision != "fp32":
        return peaks and peaks.half
    return peaks.tf32 if torch.backends.cuda.matmul.allow_tf32 else peaks.fp32


@dataclass(frozen=True)
class Pace:
    """The speed of one interval, of all ranks together.

    Attributes:
        data_wait: the share of the interval in which this rank waited for data.
        mfu: model FLOPs utilization, None where the peak is not known.
        remaining_s: the time that the rest of the run takes at this speed.
    """

    tokens_per_s: float
    step_time_s: float
    data_wait: float
    mfu: float | None
    remaining_s: float


class Throughput:
    """Measures the pace between calls of `lap`. Evaluation and saving are left out with `pause` and `resume`."""

    def __init__(
        self, tokens_after: Callable[[int], int], flops_per_token: float, world_size: int, step: int, peak: float | None
    ) -> None:
        """Start the clock after `step` optimizer steps.

        Args:
            tokens_after: returns the tokens that so many steps train on.
            flops_per_token: of training, see `flops_per_token`.
            world_size: the number of ranks.
            step: the steps that are done.
            peak: the peak of one rank, from `peak_flops`.
        """
        self.tokens_after, self.flops_per_token, self.world_size = tokens_after, flops_per_token, world_size
        self.peak = peak
        self._step, self._waited_s = step, 0.0
        self._started = time.perf_counter()
        self._paused_at = self._paused_s = 0.0

    def restart(self, step: int) -> None:
        """Start the clock again, after `step` optimizer steps."""
        self._step, self._started, self._paused_s = step, time.perf_counter(), 0.0

    def pause(self) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Let the clock continue."""
        self._paused_s += time.perf_counter() - self._paused_at

    def lap(self, step: int, total_steps: int, waited_s: float) -> Pace:
        """Return the pace since the last lap, which ends at `step` of `total_steps`.

        Args:
            waited_s: how long this rank has waited for data since the start of the run.
        """
        now = time.perf_counter()
        elapsed, steps = now - self._started - self._paused_s, step - self._step
        waited, tokens = waited_s - self._waited_s, self.tokens_after(step) - self.tokens_after(self._step)
        self._started, self._paused_s, self._step, self._waited_s = now, 0.0, step, waited_s
        tokens_per_s = tokens / elapsed
        mfu = tokens_per_s * self.flops_per_token / (self.peak * self.world_size) if self.peak else None
        return Pace(tokens_per_s, elapsed / steps, waited / elapsed, mfu, (total_steps - step) * elapsed / steps)
