"""Finds steps that would harm the run: the loss or gradient norm is not finite, or lies far above those before it.

The decisions follow from two numbers a step, which are the same on all ranks. There is no communication. The practice of
the field: OLMo-core's SkipStepOptimizer skips steps more than 6 standard deviations off the last 128. PaLM restarted some
100 steps before a spike and left out 200 to 500 batches (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pretrain.config.schema import GuardSection


@dataclass(frozen=True)
class StepVerdict:
    """The finding about a step.

    Attributes:
        kind: the finding. At an `overflow` fp16's loss scale adapts: DeepSpeed skips the step, and the guard does not
            count it.
        skip: whether the step is left out.
        reason: the quantity, its value, and the mean and standard deviation it was compared with; empty if fine.
    """

    kind: Literal["fine", "not finite", "spike", "overflow"]
    skip: bool = False
    reason: str = ""


FINE = StepVerdict("fine")


class SpikeGuard:
    """Compares each step with the losses and gradient norms of the last `window_steps` steps that were taken.

    Spikes are looked for once the window is half full. Before, only values that are not finite are found.

    Attributes:
        streak: the number of skipped steps in a row, up to now.
        streak_start: the step at which the present series of skipped steps began, None outside one.
        rollbacks: how often the run was rolled back.
    """

    def __init__(self, config: GuardSection) -> None:
        self.config = config
        self.streak = 0
        self.streak_start: int | None = None
        self.rollbacks = 0
        self._windows: dict[str, deque[float]] = {
            name: deque(maxlen=config.window_steps) for name in ("loss", "gradient norm")
        }

    def assess(self, step: int, loss: float, norm: float | None) -> StepVerdict:
        """Return the verdict on an optimizer step. Call it once for each step: the values of a step taken enter the window.

        Args:
            step: number of the step.
            loss: mean over the global batch.
            norm: of the global gradient before clipping, None if unknown.
        """
        seen = {"loss": loss} if norm is None else {"loss": loss, "gradient norm": norm}
        verdict = self._not_finite(seen) or self._spike(seen) or FINE
        if verdict.skip:
            self.streak += 1
            self.streak_start = step if self.streak_start is None else self.streak_start
        else:
            self.streak, self.streak_start = 0, None
            for name, value in seen.items():
                self._windows[name].append(value)
        return verdict

    def must_go_back(self, *, last: bool) -> bool:
        """Return whether the run must go back to before the steps that were skipped: `max_skips` in a row, or any at the end.

        Args:
            last: whether the newest step is the run's last. No step after it can show that the skips were temporary.
        """
        return self.streak >= (1 if last else self.config.max_skips)

    def rolled_back(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that holds `state`, and count the rollback."""
        rollbacks = self.rollbacks + 1
        self.load_state(state)
        self.rollbacks = rollbacks

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to make the same decisions, bit for bit: JSON numbers."""
        return {
            "windows": {name: list(window) for name, window in self._windows.items()},
            "streak": self.streak,
            "streak_start": self.streak_start,
            "rollbacks": self.rollbacks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the `state` of an earlier guard. A longer window keeps its newest values. {} is the state of a new run."""
        for name, window in self._windows.items():
            window.clear()
            window.extend(state.get("windows", {}).get(name, ()))
        self.streak, self.streak_start = state.get("streak", 0), state.get("streak_start")
        self.rollbacks = state.get("rollbacks", 0)

    def _not_finite(self, seen: dict[str, float]) -> StepVerdict | None:
        for name, value in seen.items():
            if not isfinite(value):
                return StepVerdict("not finite", skip=True, reason=f"the {name} is {value}")
        return None

    def _spike(self, seen: dict[str, float]) -> StepVerdict | None:
        for name, value in seen.items():
            window = self._windows[name]
            if len(window) < self.config.window_steps // 2:
                continue
            mean, std = _mean_and_std(window)
            if value > mean + self.config.sigma * std:
                reason = (
                    f"the {name} is {value:.6g}, more than {self.config.sigma:g} standard deviations of {std:.3g} above "
                    f"the mean {mean:.6g} of the last {len(window)} steps"
                )
                return StepVerdict("spike", skip=self.config.spikes == "skip", reason=reason)
        return None


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation with Bessel's correction. Sums are exact, so their order does not matter."""
    mean = fsum(values) / len(values)
    return mean, sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
