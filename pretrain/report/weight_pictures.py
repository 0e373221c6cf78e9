"""Which pictures the weights of the runs get, and what the page says under them."""

from __future__ import annotations

import re

from pretrain.report.picture import Picture
from pretrain.report.runs import Run
from pretrain.report.weight_panels import by_layer, compared
from pretrain.report.weights import OTHER, WeightSeries, of_role, read_weights

_TITLE = "Standard deviation of the weights"


def weight_pictures(runs: list[Run]) -> list[Picture]:
    """One run: its weights by layer. Several: a comparison first, then the same for each run that logged weights."""
    logged = {run.label: weights for run in runs if (weights := read_weights(run))}
    missing = [run.label for run in runs if run.label not in logged]
    note = f" No weights were logged for {', '.join(missing)}." if missing else ""
    if not logged:
        return [Picture("weight_std", _TITLE, "No weights were logged.", None)]
    if len(runs) == 1:
        weights = logged[runs[0].label]
        return [Picture("weight_std", _TITLE, _by_layer_caption(weights), by_layer(weights))]
    figure = compared([logged.get(run.label, []) for run in runs], [run.label for run in runs])
    comparison = Picture("weight_std", f"{_TITLE}, compared", _COMPARED_CAPTION + note, figure)
    return [comparison] + [
        Picture(
            f"weight_std_{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}",
            f"{_TITLE}: {label}",
            _by_layer_caption(weights),
            by_layer(weights),
        )
        for label, weights in logged.items()
    ]


_COMPARED_CAPTION = "Line: median over the layers. Band: from the smallest to the largest layer."


def _by_layer_caption(weights: list[WeightSeries]) -> str:
    caption = "Each weight over its whole matrix, coloured by layer. All panels of block matrices share one scale."
    if any(weight.rescaled.any() for weight in weights):
        caption += " Measured just before TVR acts: a dot is a rescaled matrix, the drop below it its rescale."
    if others := [weight.name for weight in of_role(weights, OTHER)]:
        caption += f" The layout does not know these weights, shown under {OTHER}: {', '.join(others)}."
    return caption
