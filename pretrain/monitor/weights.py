"""Watches the weights themselves: statistics and update ratio of every full weight, on its shards."""

from __future__ import annotations

from math import sqrt

import torch

from pretrain.sharded import ShardedWeights


class WeightMonitor:
    """Measures every weight around an optimizer step, every `interval_steps` steps.

    The update ratio is ‖W_after − W_before‖ / ‖W_before‖ (Frobenius) of one optimizer step, measured before any
    method edits the weights.
    """

    def __init__(self, weights: ShardedWeights, interval_steps: int) -> None:
        self.weights, self.interval_steps = weights, interval_steps
        self._before: dict[str, torch.Tensor] = {}

    def before_step(self, step: int) -> None:
        """Remember this rank's pieces if step `step` will be measured."""
        self._before = {} if step % self.interval_steps else self.weights.snapshot()

    def after_step(self, step: int) -> dict[str, dict[str, float | bool]]:
        """std, mean, kurtosis, absolute_maximum, update_ratio, rescaled (False so far) by weight name. Collective.

        Empty off the interval.
        """
        if step % self.interval_steps:
            return {}
        squared_change = self.weights.squared_change(self._before)
        self._before = {}
        facts: dict[str, dict[str, float | bool]] = {}
        for name, found in self.weights.statistics().items():
            norm = sqrt(found.squared_norm)
            facts[name] = {
                "std": found.std,
                "mean": found.mean,
                "kurtosis": found.kurtosis,
                "absolute_maximum": found.absolute_maximum,
                "update_ratio": sqrt(squared_change[name]) / norm if norm else 0.0,
                "rescaled": False,
            }
        return facts
