"""Statistics and update ratio of every full weight, measured on its shards."""

from __future__ import annotations

from math import sqrt

import torch

from pretrain.monitor.rows import WeightValues
from pretrain.sharded import ShardedWeights


class WeightMonitor:
    """Measures every weight around an optimizer step, every `interval_steps` steps.

    The update ratio is ‖W_after − W_before‖ / ‖W_after‖ (Frobenius) of one optimizer step, measured before any method
    edits the weights.
    """

    def __init__(self, weights: ShardedWeights, interval_steps: int) -> None:
        self.weights, self.interval_steps = weights, interval_steps
        self._before: dict[str, torch.Tensor] = {}

    def before_step(self, step: int) -> None:
        """Copy this rank's pieces if step `step` will be measured."""
        self._before = {} if step % self.interval_steps else self.weights.snapshot()

    def after_step(self, step: int) -> dict[str, WeightValues]:
        """Return the values of each weight by name, {} if step `step` is not measured. Collective.

        `rescaled` is False: the methods that may change it act later.
        """
        if step % self.interval_steps:
            return {}
        squared_change = self.weights.squared_change(self._before)
        self._before = {}
        measured: dict[str, WeightValues] = {}
        for name, statistics in self.weights.statistics().items():
            norm = sqrt(statistics.squared_norm)
            measured[name] = {
                "std": statistics.std,
                "mean": statistics.mean,
                "kurtosis": statistics.kurtosis,
                "absolute_maximum": statistics.absolute_maximum,
                "update_ratio": sqrt(squared_change[name]) / norm if norm else 0.0,
                "rescaled": False,
            }
        return measured
