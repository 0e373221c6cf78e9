"""The pictures that overlay all runs: loss, gradient norm, learning rate, throughput, activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pretrain.report.picture import Picture
from pretrain.report.runs import Run, number
from pretrain.report.style import ACCENT, MUTED, PAPER, compact_axis, legend, log_y_axis, run_color
from pretrain.report.traces import running_mean, thinned

_WIDTH = 11.0  # of every picture, in inches
_START = 0.2  # the share of the shortest run that the loss picture's second panel leaves out


def loss_picture(runs: list[Run]) -> Picture:
    """Draw training and validation loss: the whole run by steps, and its later part by tokens."""
    figure, whole, late = _two_panels(height=4.2)
    for index, run in enumerate(runs):
        color = run_color(index)
        steps, loss = run.series("train", "loss")
        eval_steps, eval_loss = run.series("eval", "loss")
        _noisy_line(whole, steps, loss, color)
        _noisy_line(late, run.tokens_at(steps), loss, color)
        _dots(whole, eval_steps, eval_loss, color)
        _dots(late, run.tokens_at(eval_steps), eval_loss, color)
    whole.set(title="whole run", xlabel="step", ylabel="loss (nats per token)")
    late.set(title="without the start", xlabel="tokens")
    late.set_xlim(left=_START * min(run.series("train", "tokens")[1][-1] for run in runs))
    _fit_y(late)
    whole.set_xlim(left=0)
    for axes in (whole, late):
        compact_axis(axes.xaxis)
    _run_legend(figure, runs, [_key("training"), _key("validation", linestyle="none", marker="o")])
    missing = [run.label for run in runs if not run.rows["eval"]]
    note = f" No evaluation was logged for {', '.join(missing)}." if missing else ""
    caption = "Faint: every logged value. Bold: running mean over 2% of the run. Dots: loss on the validation shards."
    return Picture("loss", "Loss", caption + note, figure)


def grad_norm_picture(runs: list[Run]) -> Picture:
    """Draw the gradient norm before clipping, with the clip values."""
    figure, axes = _figure(height=3.2)
    for index, run in enumerate(runs):
        _noisy_line(axes, *run.series("train", "grad_norm"), run_color(index))
    clips = sorted({clip for run in runs if (clip := (run.config.get("optim") or {}).get("grad_clip"))})
    for clip in clips:
        axes.axhline(clip, color=ACCENT, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set(xlabel="step", ylabel="gradient norm")
    log_y_axis(axes)
    compact_axis(axes.xaxis, ticks=10)
    named = ", ".join(f"{clip:g}" for clip in clips)
    _run_legend(figure, runs, [_key(f"clip at {named}", color=ACCENT, linestyle=(0, (4, 3)))] if clips else [])
    caption = "Norm of the whole gradient before clipping, logarithmic. Bold: running mean over 2% of the run."
    return Picture("grad_norm", "Gradient norm", caption, figure)


def learning_rate_picture(runs: list[Run]) -> Picture:
    """Draw the learning rate by step."""
    figure, axes = _figure(height=2.6)
    for index, run in enumerate(runs):
        # Runs often share their schedule: later ones are thinner, so that the earlier ones stay visible below.
        axes.plot(*thinned(*run.series("train", "lr")), color=run_color(index), linewidth=1.5 + len(runs) - 1 - index)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    compact_axis(axes.xaxis, ticks=10)
    _run_legend(figure, runs, [])
    return Picture("learning_rate", "Learning rate", "Learning rate of each logged step.", figure)


def throughput_picture(runs: list[Run]) -> Picture:
    """Draw tokens per second, and the share of time spent waiting for data."""
    figure, speed, wait = _two_panels(height=3.2)
    for index, run in enumerate(runs):
        _noisy_line(speed, *run.series("train", "tokens_per_s"), run_color(index))
        steps, share = run.series("train", "data_wait")
        _noisy_line(wait, steps, 100 * share, run_color(index))
    speed.set(title="tokens per second", xlabel="step")
    wait.set(title="waiting for data (% of the time)", xlabel="step")
    compact_axis(speed.yaxis)
    for axes in (speed, wait):
        axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1.0) if np.isfinite(axes.dataLim.y1) else 1.0)
        compact_axis(axes.xaxis)
    _run_legend(figure, runs, [])
    caption = "All ranks together. Faint: every logged value. Bold: running mean over 2% of the run."
    return Picture("throughput", "Throughput", caption, figure)


def activations_picture(runs: list[Run]) -> Picture:
    """Draw size and excess kurtosis of each block's output at the last measurement."""
    title = "Activations"
    if not any(run.rows["activations"] for run in runs):
        return Picture("activations", title, "No activations were logged.", None)
    figure, size, kurtosis = _two_panels(height=3.2)
    for index, run in enumerate(runs):
        measured = run.rows["activations"]
        layers = measured[-1]["layers"] if measured else []
        numbers = [layer["layer"] for layer in layers]
        dots: dict[str, Any] = {"color": run_color(index), "marker": "o", "markersize": 3}
        for axes, key, style in ((size, "top", "-"), (size, "median", ":"), (kurtosis, "excess_kurtosis", "-")):
            axes.plot(numbers, [number(layer.get(key)) for layer in layers], linestyle=style, **dots)
    size.set(title="magnitude", xlabel="layer")
    kurtosis.set(title="excess kurtosis", xlabel="layer")
    log_y_axis(size)
    for axes in (size, kurtosis):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    _run_legend(figure, runs, [_key("largest"), _key("median", linestyle=":")])
    missing = [run.label for run in runs if not run.rows["activations"]]
    note = f" None were logged for {', '.join(missing)}." if missing else ""
    return Picture("activations", title, "Outputs of each block at each run's last measurement." + note, figure)


def _empty(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, wspace=0.03))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = _empty(height)
    return figure, figure.add_subplot()


def _two_panels(height: float) -> tuple[Figure, Axes, Axes]:
    figure = _empty(height)
    left, right = figure.subplots(1, 2)
    return figure, left, right


def _noisy_line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    axes.plot(*thinned(x, y), color=color, linewidth=0.8, alpha=0.28)
    axes.plot(*thinned(x, running_mean(y)), color=color, linewidth=1.6)


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    axes.plot(x, y, color=color, linestyle="none", marker="o", markersize=4.5, markeredgecolor=PAPER, zorder=3)


def _fit_y(axes: Axes) -> None:
    """Fit the y axis to what lies within the x limits."""
    low, high = axes.get_xlim()
    x = np.concatenate([line.get_xdata() for line in axes.lines])
    y = np.concatenate([line.get_ydata() for line in axes.lines])
    shown = y[(x >= low) & (x <= high) & np.isfinite(y)]
    if len(shown) and shown.min() < shown.max():
        margin = 0.06 * (shown.max() - shown.min())
        axes.set_ylim(shown.min() - margin, shown.max() + margin)


def _key(label: str, color: str = MUTED, **style: Any) -> Line2D:
    return Line2D([], [], color=color, label=label, **style)


def _run_legend(figure: Figure, runs: list[Run], keys: list[Line2D]) -> None:
    legend(figure, [_key(run.label, run_color(index), linewidth=2.5) for index, run in enumerate(runs)] + keys)
