"""The standard deviation of every weight over time, sorted by role, and the rule that TVR holds it to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from pretrain.errors import UserError
from pretrain.layout import MATRIX_ROLES, role_and_layer
from pretrain.report.runs import Run, number

OTHER = "other"


@dataclass(frozen=True)
class WeightSeries:
    """One weight over time.

    role: as in `pretrain.layout`, or "other" for a name the layout does not know; layer: from 1, None outside blocks.
    steps, std, rescaled: (rows,); std is measured before a rescale of the same step.
    target: the deviation TVR rescales to, None where it leaves the weight; thresholds: those beyond which it acts.
    """

    name: str
    role: str
    layer: int | None
    steps: np.ndarray
    std: np.ndarray
    rescaled: np.ndarray
    target: float | None
    thresholds: tuple[float, ...]

    def path(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and deviations to draw: after each rescaled point the target, so that a rescale shows as a drop."""
        if self.target is None:
            return self.steps, self.std
        after = np.flatnonzero(self.rescaled) + 1
        return np.insert(self.steps, after, self.steps[after - 1]), np.insert(self.std, after, self.target)


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
    target, thresholds = _tvr_rule(name, role, layer, methods)
    return WeightSeries(
        name=name,
        role=role,
        layer=layer,
        steps=np.array([step for step, _ in facts], dtype=float),
        std=np.array([number(fact.get("std")) for _, fact in facts]),
        rescaled=np.array([bool(fact.get("rescaled")) for _, fact in facts]),
        target=target,
        thresholds=thresholds,
    )


def _role_and_layer(name: str) -> tuple[str, int | None]:
    try:
        return role_and_layer(name)
    except UserError:
        return OTHER, None


def _tvr_rule(name: str, role: str, layer: int | None, methods: list[dict]) -> tuple[float | None, tuple[float, ...]]:
    """TVR's target and thresholds for one weight, from the options in the resolved configuration."""
    tvr = next((method for method in methods if method.get("name") == "tvr"), None)
    if tvr is None or layer is None or role not in tvr.get("roles", MATRIX_ROLES) or name in tvr.get("exclude", ()):
        return None, ()
    target = tvr["target_std"] / (sqrt(layer) if tvr.get("scale_with_depth") else 1.0)
    ratio = tvr["ratio_threshold"]
    return target, (target / ratio, target * ratio) if tvr.get("two_sided") else (target * ratio,)
