"""The standard deviation and the mean of every weight over time, and TVR's target for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from pretrain.errors import UserError
from pretrain.model.layout import MATRIX_ROLES, role_and_layer
from pretrain.monitor.rows import WeightsRow
from pretrain.report.runs import Run, number

OTHER = "other"
FACTOR = "scale"  # the role of a factor of a stored matrix

_BY_MEAN = (FACTOR, "alpha")  # roles whose size matters, not how much their elements differ
_LIMITS = ("target", "threshold", "lower_threshold")  # as TVR writes them into the rows


@dataclass(frozen=True)
class WeightCurve:
    """One weight over time.

    Attributes:
        name: As in the trained model.
        role: As in `pretrain.model.layout`, or "other" for a name that is not in the layout.
        matrix: For a factor the role of the matrix that it multiplies; else None.
        layer: From 1; None outside blocks.
        steps: The steps of its rows, (rows,).
        values: Standard deviations before a rescale of the same step, (rows,); the means after `as_mean`.
        mean: (rows,).
        rescaled: Whether TVR rescaled it at this step, (rows,).
        target: The deviation to which TVR rescales, (rows,); NaN where TVR does not act on the weight.
        thresholds: The limits beyond which it acts, each (rows,); none if it never acts on the weight.
    """

    name: str
    role: str
    matrix: str | None
    layer: int | None
    steps: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    rescaled: np.ndarray
    target: np.ndarray
    thresholds: tuple[np.ndarray, ...]

    @property
    def held(self) -> bool:
        """True if TVR controls this weight."""
        return bool(np.isfinite(self.target).any())

    @property
    def by_mean(self) -> bool:
        """True if its mean says more than its deviation: a factor, or one number, whose deviation is always 0."""
        one_number = not np.any(self.values[np.isfinite(self.values)]) and np.any(self.mean[np.isfinite(self.mean)])
        return self.role in _BY_MEAN or bool(one_number)

    def as_mean(self) -> WeightCurve:
        """Return the same weight with its mean in place of its deviation, and so without TVR's limits on that."""
        nothing = np.full(len(self.steps), np.nan)
        return replace(self, values=self.mean, rescaled=np.isfinite(nothing), target=nothing, thresholds=())

    def path(self) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values to draw: after each rescaled point the target, so that a rescale shows as a drop."""
        rescaled = np.flatnonzero(self.rescaled & np.isfinite(self.target))
        steps = np.insert(self.steps, rescaled + 1, self.steps[rescaled])
        return steps, np.insert(self.values, rescaled + 1, self.target[rescaled])


def read_weights(run: Run) -> list[WeightCurve]:
    """Return every weight in the run's weights rows, in the order of their appearance; [] if it logged none."""
    rows = run.rows["weights"]
    names = dict.fromkeys(name for row in rows for name in row["weights"])
    return [_series(name, rows, run.config.get("methods") or []) for name in names]


def _series(name: str, rows: list[WeightsRow], methods: list[dict]) -> WeightCurve:
    role, layer = _role_and_layer(name)
    measured = [(row["step"], row["weights"][name]) for row in rows if name in row["weights"]]
    limits = {key: np.array([number(values.get(key)) for _, values in measured]) for key in _LIMITS}
    if not any(np.isfinite(values).any() for values in limits.values()):
        limits = {key: np.full(len(measured), value) for key, value in _old_limits(name, role, layer, methods).items()}
    return WeightCurve(
        name=name,
        role=role,
        matrix=_role_and_layer(f"{name.rpartition('.')[0]}.weight")[0] if role == FACTOR else None,
        layer=layer,
        steps=np.array([step for step, _ in measured], dtype=float),
        values=np.array([number(values.get("std")) for _, values in measured]),
        mean=np.array([number(values.get("mean")) for _, values in measured]),
        rescaled=np.array([bool(values.get("rescaled")) for _, values in measured]),
        target=limits["target"],
        thresholds=tuple(limits[key] for key in _LIMITS[1:] if np.isfinite(limits[key]).any()),
    )


def _role_and_layer(name: str) -> tuple[str, int | None]:
    try:
        return role_and_layer(name)
    except UserError:
        return OTHER, None


def _old_limits(name: str, role: str, layer: int | None, methods: list[dict]) -> dict[str, float]:
    """Return TVR's limits for one weight from the options of a run whose rows lack them; NaN for none."""
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
