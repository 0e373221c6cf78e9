"""The look of every picture, and its colours in the reader's light or dark theme.

Pictures are drawn in the light colours. In the page each of these colours becomes a CSS variable that has a dark value
too, so one SVG serves both. PNGs keep the light ones.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from pretrain.report.units import compact

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, GRID, PAPER, ACCENT = "#1f2328", "#66707a", "#e6e9ed", "#ffffff", "#d1242f"
RUNS = ("#2563b8", "#dd7a1c", "#24855b", "#a23b9e", "#7a5230", "#4b5a6b")

_DARK = {
    INK: "#e6e8eb",
    MUTED: "#9aa4ae",
    GRID: "#2a3037",
    PAPER: "#14171a",
    ACCENT: "#ff6b63",
    **dict(zip(RUNS, ("#6ea8fe", "#f7a65c", "#5bc898", "#de8fe3", "#cda27e", "#a9b6c4"), strict=True)),
}

# The ends of viridis that vanish on the page's background are left out: yellow on white, violet on black.
_SHADES = 256
_VIRIDIS = matplotlib.colormaps["viridis"]
_LIGHT_RAMP = [to_hex(_VIRIDIS(0.88 * shade / (_SHADES - 1))) for shade in range(_SHADES)]
_DARK_RAMP = [to_hex(_VIRIDIS(0.24 + 0.74 * shade / (_SHADES - 1))) for shade in range(_SHADES)]

DARK_OF = dict(zip(_LIGHT_RAMP, _DARK_RAMP, strict=True)) | _DARK

RC: dict[RcKeyType, Any] = {
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a run may have a $ in its name
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "svg.fonttype": "none",  # text stays text: the reader's own system font, sharp at every size
}


def run_color(index: int) -> str:
    """Return the colour of the run at this place of the command line, in every picture and table."""
    return RUNS[index]


def layer_color(layer: int | None, layers: int) -> str:
    """Return the colour of layer 1..layers, from dark (first) to light (last); ink for weights outside the blocks."""
    if layer is None:
        return INK
    return _LIGHT_RAMP[round((layer - 1) / max(layers - 1, 1) * (_SHADES - 1))]


def compact_axis(axis: matplotlib.axis.Axis, ticks: int = 6) -> None:
    """Label an axis of steps, tokens or rates as 500, 1k, 2.5M."""
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """Draw a legend above the panels, in as many columns as the longest label allows."""
    if handles:
        columns = 130 // (8 + max(len(str(handle.get_label())) for handle in handles))
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(max(columns, 1), len(handles)),
            columnspacing=1.6,
            handlelength=2.2,
        )


def log_y_axis(axes: Axes) -> None:
    """Make the y axis of drawn data logarithmic, labelled with plain numbers, and at least a factor of 4 high."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
