"""The pictures of the weights: one small panel for each role, all roles of a group on the same scale.

`by_layer` shows every weight of one run in the colour of its layer, `compared` the runs side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pretrain.report.style import ACCENT, MUTED, compact_axis, layer_color, legend, run_color
from pretrain.report.traces import thinned
from pretrain.report.weights import OTHER, WeightSeries, of_role

_ATTENTION = ("q", "k", "v", "qkv", "o")
_MLP = ("gate", "up", "down")
_OUTSIDE = (("embed", "position", "head"), ("norm",), ("bias",), (OTHER,))
_GROUPS = (_ATTENTION, _MLP, *_OUTSIDE)  # the order of the panels
_SCALES = (_ATTENTION + _MLP, *_OUTSIDE)  # roles that share a y axis; TVR acts on the first
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
    "norm": "gains",
}
_TARGET = {"color": ACCENT, "linewidth": 1.1, "linestyle": (0, (5, 2.5))}
_THRESHOLD = {"color": ACCENT, "linewidth": 1.1, "linestyle": (0, (1, 1.8))}
_POINTS = 600  # of one line in one small panel
_COLUMNS = 4


def by_layer(weights: list[WeightSeries]) -> Figure:
    """Standard deviation of every weight of one run, coloured by layer, with TVR's target, threshold and rescales."""
    layers = max((weight.layer for weight in weights if weight.layer), default=0)

    def draw(axes: Axes, role: str) -> None:
        chosen = of_role(weights, role)
        for weight in chosen:
            color = layer_color(weight.layer, layers)
            axes.plot(*thinned(*weight.path(), _POINTS), color=color, linewidth=0.7)
            axes.plot(
                *thinned(weight.steps[weight.rescaled], weight.std[weight.rescaled], _POINTS),
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
    figure = _panels(weights, draw)
    legend(figure, keys)
    if layers:
        _layer_strip(figure, layers)
    return figure


def compared(runs: list[list[WeightSeries]], labels: list[str]) -> Figure:
    """Each run's median over the layers, with a band from the smallest to the largest layer and its TVR target."""

    def draw(axes: Axes, role: str) -> None:
        for index, weights in enumerate(runs):
            color, chosen = run_color(index), of_role(weights, role)
            if not chosen:
                continue
            steps, std = _by_step(chosen)
            axes.fill_between(steps, np.nanmin(std, 1), np.nanmax(std, 1), color=color, alpha=0.16, linewidth=0)
            axes.plot(steps, np.nanmedian(std, 1), color=color, linewidth=1.4)
            _limits(
                axes, chosen, lambda weight: (weight.target,),
                color=color, linewidth=1.0, linestyle=_TARGET["linestyle"],
            )  # fmt: skip

    keys = [Line2D([], [], color=run_color(index), linewidth=2.5, label=label) for index, label in enumerate(labels)]
    weights = [weight for weights in runs for weight in weights]
    if any(weight.held for weight in weights):
        keys += [Line2D([], [], label="TVR target", **_TARGET | {"color": MUTED})]
    figure = _panels(weights, draw)
    legend(figure, keys)
    return figure


def _limits(
    axes: Axes, weights: list[WeightSeries], limits: Callable[[WeightSeries], tuple[np.ndarray, ...]], **style: Any
) -> None:
    """Targets or thresholds, over the whole width where they stay the same; what several weights share once."""
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


def _panels(weights: list[WeightSeries], draw: Callable[[Axes, str], None]) -> Figure:
    """One panel for each role that has weights, filled by `draw(axes, role)`."""
    rows = _rows({weight.role for weight in weights})
    columns = max(map(len, rows))
    tops = _tops(weights)
    figure = Figure(figsize=(11.0, 0.5 + 2.0 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    grid = figure.add_gridspec(len(rows), columns)
    last_step = max(1.0, *(weight.steps[-1] for weight in weights))
    for y, roles in enumerate(rows):
        for x, role in enumerate(roles):
            axes = figure.add_subplot(grid[y, x])
            draw(axes, role)
            axes.set_title(f"{role} · {_MEANING[role]}" if role in _MEANING else role)
            axes.set(xlim=(0, 1.02 * last_step), ylim=(0, tops[role]))
            compact_axis(axes.xaxis, ticks=4)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            is_last_row = y + 1 == len(rows)
            axes.set_xlabel("step" if is_last_row else "")
            axes.tick_params(labelbottom=is_last_row or x >= len(rows[y + 1]))
    return figure


def _rows(present: set[str]) -> list[list[str]]:
    """The roles present, in rows of at most `_COLUMNS`; a group that does not fit into the last row begins one."""
    rows: list[list[str]] = [[]]
    for group in _GROUPS:
        roles = [role for role in group if role in present]
        if len(rows[-1]) + len(roles) > _COLUMNS:
            rows.append([])
        for role in roles:
            if len(rows[-1]) == _COLUMNS:
                rows.append([])
            rows[-1].append(role)
    return [row for row in rows if row]


def _tops(weights: list[WeightSeries]) -> dict[str, float]:
    """The top of each role's y axis, one for all roles that share a scale."""
    tops = {}
    for roles in _SCALES:
        lines = [line for weight in weights if weight.role in roles for line in (weight.std, *weight.thresholds)]
        values = np.concatenate([np.zeros(1), *lines])
        tops |= dict.fromkeys(roles, 1.08 * float(values[np.isfinite(values)].max()) or 1.0)
    return tops


def _layer_strip(figure: Figure, layers: int) -> None:
    """A legend at the top right with one swatch for each layer, first to last."""
    swatches = tuple(Rectangle((0, 0), 1, 1, facecolor=layer_color(n, layers)) for n in range(1, layers + 1))
    figure.legend(
        handles=[swatches],
        labels=[f"layers 1 to {layers}" if layers > 1 else "layer 1"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=16,
        loc="outside upper right",
    )


def _by_step(weights: list[WeightSeries]) -> tuple[np.ndarray, np.ndarray]:
    """The steps (steps,) at which any of `weights` was measured, and (steps, weights) deviations, NaN where one was not."""
    steps = np.unique(np.concatenate([weight.steps for weight in weights]))
    std = np.full((len(steps), len(weights)), np.nan)
    for column, weight in enumerate(weights):
        std[np.searchsorted(steps, weight.steps), column] = weight.std
    measured = np.isfinite(std).any(axis=1)  # a diverged run logs null
    return steps[measured], std[measured]
