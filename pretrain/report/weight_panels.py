"""The pictures of the weights: one small panel for each role, and for the factors of each role's matrices.

`by_layer` shows every weight of one run in the colour of its layer, `compared` the runs side by side. Deviations of the
roles of a group share a scale that begins at 0; means have a scale of their own in each panel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pretrain.report.style import ACCENT, MUTED, compact_axis, layer_color, legend, run_color
from pretrain.report.traces import thinned
from pretrain.report.weight_series import FACTOR, OTHER, WeightCurve

_ATTENTION = ("q", "k", "v", "qkv", "o")
_MLP = ("gate", "up", "down")
_ENDS = ("embed", "position", "head")
_VECTORS = (("norm",), ("alpha",), ("beta",), ("query",), ("bias",))
_ROLES = (_ATTENTION, _MLP, _ENDS, ("projection",), *_VECTORS)
_FACTORS = tuple(tuple(f"{role} · factor" for role in roles) for roles in (_ATTENTION, _MLP, (*_ENDS, "projection")))
_GROUPS = (*_ROLES, *_FACTORS, (OTHER,))  # the order of the panels
_PANELS = {panel for group in _GROUPS for panel in group}
_SCALES = (_ATTENTION + _MLP, *_ROLES[2:], (OTHER,))  # panels of deviations that share a y axis; TVR acts on the first
_MEANING = {
    "q": "query",
    "k": "key",
    "v": "value",
    "qkv": "fused",
    "o": "output",
    "gate": "MLP",
    "up": "MLP",
    "down": "MLP",
    "embed": "tokens",
    "position": "positions",
    "head": "logits",
    "projection": "EmbProj",
    "norm": "gains",
    "alpha": "gain by token",
    "beta": "gain by token",
    "query": "Attention Residuals",
}
_TARGET: dict[str, Any] = {"color": ACCENT, "linewidth": 1.1, "linestyle": (0, (5, 2.5))}
_THRESHOLD: dict[str, Any] = {"color": ACCENT, "linewidth": 1.1, "linestyle": (0, (1, 1.8))}
_POINTS = 600  # of one line in one small panel
_MARGIN, _LEAST_MARGIN = 0.08, 0.01  # of a y axis that does not begin at 0: shares of the range and of the values
_COLUMNS = 4


def panel_of(weight: WeightCurve) -> str:
    """Return the panel of this weight: its role's, the one of its matrix's factors, or "other"."""
    panel = f"{weight.matrix} · factor" if weight.role == FACTOR else weight.role
    return panel if panel in _PANELS else OTHER


def by_layer(weights: list[WeightCurve], from_zero: bool = True) -> Figure:
    """Draw the values of every weight of one run, coloured by layer, with TVR's target, threshold and rescales.

    Args:
        weights: The weights of the run.
        from_zero: Whether y axes begin at 0 and are shared, as for deviations; else each fits its panel's values.
    """
    layers = max((weight.layer for weight in weights if weight.layer), default=0)

    def draw(axes: Axes, panel: str) -> None:
        chosen = _shown(weights, panel)
        for weight in chosen:
            color = layer_color(weight.layer, layers)
            axes.plot(*thinned(*weight.path(), _POINTS), color=color, linewidth=0.7)
            axes.plot(
                *thinned(weight.steps[weight.rescaled], weight.values[weight.rescaled], _POINTS),
                color=color, linestyle="none", marker="o", markersize=1.8, markeredgewidth=0,
            )  # fmt: skip
        _limits(axes, chosen, lambda weight: (weight.target,), **_TARGET, zorder=3)
        _limits(axes, chosen, lambda weight: weight.thresholds, **_THRESHOLD, zorder=3)
        if count := sum(int(weight.rescaled.sum()) for weight in chosen):
            axes.set_title(f"{count:,} rescales", loc="right", fontsize=8.5, color=MUTED)

    keys = []
    if any(weight.held for weight in weights):
        keys += [Line2D([], [], label="TVR target", **_TARGET), Line2D([], [], label="TVR threshold", **_THRESHOLD)]
    if any(weight.rescaled.any() for weight in weights):
        keys += [Line2D([], [], color=MUTED, marker="o", markersize=3.5, linestyle="none", label="rescaled")]
    figure = _panels(weights, draw, from_zero)
    legend(figure, keys)
    if layers:
        _layer_strip(figure, layers)
    return figure


def compared(runs: list[list[WeightCurve]], labels: list[str], from_zero: bool = True) -> Figure:
    """Draw each run's median over the layers, with a band from the smallest to the largest layer and its TVR target."""

    def draw(axes: Axes, panel: str) -> None:
        for index, weights in enumerate(runs):
            color, chosen = run_color(index), _shown(weights, panel)
            if not chosen:
                continue
            steps, values = _by_step(chosen)
            axes.fill_between(steps, np.nanmin(values, 1), np.nanmax(values, 1), color=color, alpha=0.16, linewidth=0)
            axes.plot(steps, np.nanmedian(values, 1), color=color, linewidth=1.4)
            _limits(
                axes, chosen, lambda weight: (weight.target,),
                color=color, linewidth=1.0, linestyle=_TARGET["linestyle"],
            )  # fmt: skip

    keys = [Line2D([], [], color=run_color(index), linewidth=2.5, label=label) for index, label in enumerate(labels)]
    weights = [weight for weights in runs for weight in weights]
    if any(weight.held for weight in weights):
        keys += [Line2D([], [], label="TVR target", **_TARGET | {"color": MUTED})]
    figure = _panels(weights, draw, from_zero)
    legend(figure, keys)
    return figure


def _limits(
    axes: Axes, weights: list[WeightCurve], limits: Callable[[WeightCurve], tuple[np.ndarray, ...]], **style: Any
) -> None:
    """Draw targets or thresholds, over the whole width if they are constant; a line that several weights share once."""
    drawn = set()
    for weight in weights:
        for limit in limits(weight):
            known = np.isfinite(limit)
            steps, values = weight.steps[known], limit[known]
            if not len(values) or (line := (steps.tobytes(), values.tobytes())) in drawn:
                continue
            drawn.add(line)
            if np.all(values == values[0]):
                axes.axhline(values[0], **style)
            else:
                axes.plot(*thinned(steps, values, _POINTS), **style)


def _shown(weights: list[WeightCurve], panel: str) -> list[WeightCurve]:
    return [weight for weight in weights if panel_of(weight) == panel]


def _panels(weights: list[WeightCurve], draw: Callable[[Axes, str], None], from_zero: bool) -> Figure:
    """Draw every panel that has weights, filled by `draw(axes, panel)`."""
    rows = _rows({panel_of(weight) for weight in weights})
    columns = max(map(len, rows))
    y_limits = _shared_from_zero(weights) if from_zero else _fitted(weights)
    figure = Figure(figsize=(11.0, 0.5 + 2.0 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    grid = figure.add_gridspec(len(rows), columns)
    last_step = max(1.0, *(weight.steps[-1] for weight in weights))
    for y, panels in enumerate(rows):
        for x, panel in enumerate(panels):
            axes = figure.add_subplot(grid[y, x])
            draw(axes, panel)
            axes.set_title(f"{panel} · {_MEANING[panel]}" if panel in _MEANING else panel)
            axes.set(xlim=(0, 1.02 * last_step), ylim=y_limits[panel])
            compact_axis(axes.xaxis, ticks=4)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            is_last_row = y + 1 == len(rows)
            axes.set_xlabel("step" if is_last_row else "")
            axes.tick_params(labelbottom=is_last_row or x >= len(rows[y + 1]))
    return figure


def _rows(present: set[str]) -> list[list[str]]:
    """Return the panels present, in rows of at most `_COLUMNS`. A group that does not fit into the last row begins one."""
    rows: list[list[str]] = [[]]
    for group in _GROUPS:
        panels = [panel for panel in group if panel in present]
        if len(rows[-1]) + len(panels) > _COLUMNS:
            rows.append([])
        for panel in panels:
            if len(rows[-1]) == _COLUMNS:
                rows.append([])
            rows[-1].append(panel)
    return [row for row in rows if row]


def _shared_from_zero(weights: list[WeightCurve]) -> dict[str, tuple[float, float]]:
    """Return each panel's y limits: from 0, the same for all panels that share a scale."""
    limits: dict[str, tuple[float, float]] = {}
    for panels in _SCALES:
        shown = [weight for weight in weights if panel_of(weight) in panels]
        values = _finite([np.zeros(1), *(line for weight in shown for line in (weight.values, *weight.thresholds))])
        limits |= dict.fromkeys(panels, (0.0, 1.08 * float(values.max()) or 1.0))
    return limits


def _fitted(weights: list[WeightCurve]) -> dict[str, tuple[float, float]]:
    """Return each panel's y limits, around its own values; wide enough that a negligible change looks small."""
    limits = {}
    for panel in {panel_of(weight) for weight in weights}:
        values = _finite([weight.values for weight in _shown(weights, panel)])
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
        margin = max(_MARGIN * (high - low), _LEAST_MARGIN * max(abs(low), abs(high))) or 1.0
        limits[panel] = (low - margin, high + margin)
    return limits


def _finite(lines: list[np.ndarray]) -> np.ndarray:
    """Return the finite values of all lines together."""
    values = np.concatenate(lines)
    return values[np.isfinite(values)]


def _layer_strip(figure: Figure, layers: int) -> None:
    """Draw a legend at the top right with one swatch for each layer, first to last."""
    swatches = tuple(Rectangle((0, 0), 1, 1, facecolor=layer_color(n, layers)) for n in range(1, layers + 1))
    figure.legend(
        handles=[swatches],
        labels=[f"layers 1 to {layers}" if layers > 1 else "layer 1"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=16,
        loc="outside upper right",
    )


def _by_step(weights: list[WeightCurve]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (steps,) at which any weight was measured, and values (steps, weights), NaN where one was not."""
    steps = np.unique(np.concatenate([weight.steps for weight in weights]))
    values = np.full((len(steps), len(weights)), np.nan)
    for column, weight in enumerate(weights):
        values[np.searchsorted(steps, weight.steps), column] = weight.values
    measured = np.isfinite(values).any(axis=1)  # a diverged run logs null
    return steps[measured], values[measured]
