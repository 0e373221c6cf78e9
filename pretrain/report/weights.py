"""The standard deviation of every weight over time, sorted by role, and the target that TVR holds it to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pretrain.errors import UserError
from pretrain.layout import MATRIX_ROLES, role_and_layer
from pretrain.report.runs import Run, number

OTHER = "other"

_LIMITS = ("target", "threshold", "lower_threshold")  # as TVR writes them into the rows


@dataclass(frozen=True)
class WeightSeries:
    """One weight over time.

    role: as in `pretrain.layout`, or "other" for a name the layout does not know; layer: from 1, None outside blocks.
    steps, std, rescaled: (rows,); std is measured before a rescale of the same step.
    target: (rows,) the deviation TVR rescales to, NaN where it does not look at the weight.
    thresholds: those beyond which it acts, each (rows,); none where it never looks at the weight.
    """

    name: str
    role: str
    layer: int | None
    steps: np.ndarray
    std: np.ndarray
    rescaled: np.ndarray
    target: np.ndarray
    thresholds: tuple[np.ndarray, ...]

    @property
    def held(self) -> bool:
        """Whether TVR looks at this weight."""
        return bool(np.isfinite(self.target).any())

    def path(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and deviations to draw: after each rescaled point the target, so that a rescale shows as a drop."""
        rescaled = np.flatnonzero(self.rescaled & np.isfinite(self.target))
        steps = np.insert(self.steps, rescaled + 1, self.steps[rescaled])
        return steps, np.insert(self.std, rescaled + 1, self.target[rescaled])


def read_weights(run: Run) -> list[WeightSeries]:
    """Every weight named in the run's weights rows, in the order of their appearance; [] if it logged none."""
    rows = run.rows.get("weights", [])
    names = dict.fromkeys(name for row in rows for name, facts in row.items() if isinstance(facts, dict))
    return [_series(name, rows, run.config.get("methods") or []) for name in names]


def of_role(weights: Iterable[WeightSeries], role: str) -> list[WeightSeries]:
    """The weights of one role, in their order."""
    return [weight for weight in weights if weight.role == role]


def _series(name: str, rows: list[dict], methods: list[dict]) -> WeightSeries:
    role, layer = _role_and_layer(name)
    facts = [(row["step"], row[name]) for row in rows if name in row]
    limits = {key: np.array([number(fact.get(key)) for _, fact in facts]) for key in _LIMITS}
    if not any(np.isfinite(values).any() for values in limits.values()):
        limits = {key: np.full(len(facts), value) for key, value in _old_limits(name, role, layer, methods).items()}
    return WeightSeries(
        name=name,
        role=role,
        layer=layer,
        steps=np.array([step for step, _ in facts], dtype=float),
        std=np.array([number(fact.get("std")) for _, fact in facts]),
        rescaled=np.array([bool(fact.get("rescaled")) for _, fact in facts]),
        target=limits["target"],
        thresholds=tuple(limits[key] for key in _LIMITS[1:] if np.isfinite(limits[key]).any()),
    )


def _role_and_layer(name: str) -> tuple[str, int | None]:
    try:
        return role_and_layer(name)
    except UserError:
        return OTHER, None


def _old_limits(name: str, role: str, layer: int | None, methods: list[dict]) -> dict[str, float]:
    """What TVR held one weight to, from the options of a run whose rows do not say it; NaN for nothing."""
    nothing = dict.fromkeys(_LIMITS, float("nan"))
    tvr = next((method for method in methods if method.get("name") == "tvr"), None)
    if tvr is None or layer is None or role not in tvr.get("roles", MATRIX_ROLES) or name in tvr.get("exclude", ()):
        return nothing
    if not tvr.get("target_std"):
        return nothing
    target = tvr["target_std"] / (sqrt(layer) if tvr.get("scale_with_depth") else 1.0)
    ratio = tvr["ratio_threshold"]
    lower = {"lower_threshold": target / ratio} if tvr.get("two_sided") else {}
    return nothing | {"target": target, "threshold": target * ratio} | lower
