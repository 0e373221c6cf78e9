"""The pictures of the weights of the runs, and their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pretrain.report.picture import Picture
from pretrain.report.runs import Run
from pretrain.report.weight_panels import by_layer, compared, panel_of
from pretrain.report.weight_series import OTHER, WeightCurve, read_weights

_Logged = Mapping[str, list[WeightCurve]]  # the weights of each run that logged any, by its label

_STD, _MEAN = "weight_std", "weight_mean"
_TITLES = {_STD: "Standard deviation of the weights", _MEAN: "Factors and gains"}
_BY_LAYER = {
    _STD: "Each weight over its whole matrix, coloured by layer. All panels of block matrices share one scale.",
    _MEAN: "Mean of what multiplies stored matrices or activations, coloured by layer. Each panel has its own scale.",
}
_COMPARED = {
    _STD: "Line: median over the layers. Band: from the smallest to the largest layer.",
    _MEAN: "Means. Line: median over the layers. Band: from the smallest to the largest layer.",
}
_MISSING = {_STD: "No weights were logged for", _MEAN: "There are none in"}


def weight_pictures(runs: list[Run]) -> list[Picture]:
    """Return the deviations of the weights, then the means of weights for which those say more, if there are any."""
    logged = {run.label: weights for run in runs if (weights := read_weights(run))}
    if not logged:
        return [Picture(_STD, _TITLES[_STD], "No weights were logged.", None)]
    labels = [run.label for run in runs]
    by_deviation = {label: [weight for weight in logged[label] if not weight.by_mean] for label in logged}
    return _pictures(_STD, labels, by_deviation) + _pictures(_MEAN, labels, _means(logged))


def _means(logged: _Logged) -> dict[str, list[WeightCurve]]:
    """Return the means of every weight in a panel that some run needs, so that all runs can be compared there."""
    panels = {panel_of(weight) for weights in logged.values() for weight in weights if weight.by_mean}
    return {
        label: [weight.as_mean() for weight in weights if panel_of(weight) in panels]
        for label, weights in logged.items()
    }


def _pictures(kind: str, labels: list[str], logged: _Logged) -> list[Picture]:
    """Return, for one run, its weights by layer; for several, a comparison and then each run that has such weights."""
    logged = {label: weights for label, weights in logged.items() if weights}
    from_zero = kind == _STD
    title = _TITLES[kind]
    if len(labels) == 1:
        return [
            Picture(kind, title, _by_layer_caption(kind, weights), by_layer(weights, from_zero))
            for weights in logged.values()
        ]
    if not logged:
        return []
    missing = [label for label in labels if label not in logged]
    note = f" {_MISSING[kind]} {', '.join(missing)}." if missing else ""
    figure = compared([logged.get(label, []) for label in labels], labels, from_zero)
    return [Picture(kind, f"{title}, compared", _COMPARED[kind] + note, figure)] + [
        Picture(
            f"{kind}_{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}",
            f"{title}: {label}",
            _by_layer_caption(kind, weights),
            by_layer(weights, from_zero),
        )
        for label, weights in logged.items()
    ]


def _by_layer_caption(kind: str, weights: list[WeightCurve]) -> str:
    caption = _BY_LAYER[kind]
    if any(weight.rescaled.any() for weight in weights):
        caption += " Measured just before TVR acts: a dot is a rescaled matrix, the drop below it its rescale."
    if others := [weight.name for weight in weights if panel_of(weight) == OTHER]:
        caption += f" Weights that no other panel is made for are shown under {OTHER}: {', '.join(others)}."
    return caption
