"""ZClip: clip the gradient if its norm is an outlier among the run's own (Kumar et al. 2025, arXiv 2504.02507).

With mean m and standard deviation s of past norms, a norm g has the z-score z = (g - m) / s. If z > t, it is clipped to

    m + (t^2 / z) s

So the larger an outlier is, the nearer to the mean it is clipped. m and s^2 are first those of `warmup_steps` norms, then
decaying averages of the norms as clipped:

    m <- a m + (1 - a) g        s^2 <- a s^2 + (1 - a) (g - m)^2        with the new m
"""

from __future__ import annotations

from math import fsum, sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.optim_section import ZClipSection

_EPS = 1e-6  # added to s, as in the published code


class ZClip:
    """The running statistics of one run's gradient norms, in float64."""

    def __init__(self, config: ZClipSection) -> None:
        self.config = config
        self._warmup: list[float] = []
        self._mean = self._variance = 0.0

    def clip(self, norm: float) -> float:
        """Return the norm to clip a gradient to, and update the statistics. Call it once for each step taken.

        Args:
            norm: the norm of the gradient.

        Returns:
            `norm`, or less if it is an outlier.
        """
        if len(self._warmup) < self.config.warmup_steps:
            self._warmup.append(norm)
            self._mean = fsum(self._warmup) / len(self._warmup)
            self._variance = fsum((value - self._mean) ** 2 for value in self._warmup) / len(self._warmup)
            return norm
        clipped, alpha = self._clipped(norm), self.config.alpha
        self._mean = alpha * self._mean + (1 - alpha) * clipped
        self._variance = alpha * self._variance + (1 - alpha) * (clipped - self._mean) ** 2
        return clipped

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs to clip in the same way, bit for bit, as JSON values."""
        return {"warmup": list(self._warmup), "mean": self._mean, "variance": self._variance}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the `state` of an earlier run. {} is the state at the start of a run."""
        self._warmup = list(state.get("warmup", ()))
        self._mean, self._variance = state.get("mean", 0.0), state.get("variance", 0.0)

    def _clipped(self, norm: float) -> float:
        threshold, std = self.config.z_threshold, sqrt(self._variance)
        score = (norm - self._mean) / (std + _EPS)
        return self._mean + threshold**2 / score * std if score > threshold else norm
