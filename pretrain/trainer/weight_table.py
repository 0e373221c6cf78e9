"""The table of weights that a run prints at its start: initial values, optimizer, and the rules of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.config.schema import Config
from pretrain.engine.initialize import initial_rule
from pretrain.model.layout import Weight, role_and_layer
from pretrain.optim.param_groups import optimizer_rule
from pretrain.sharded import Moments
from pretrain.starting import StartingPoint, rule_in_words

_HEADER = ("weights", "layers", "count", "shape", "initial values", "std", "optimizer", "in training")


def describe_weights(
    weights: Sequence[Weight],
    config: Config,
    default_std: float,
    start: StartingPoint | None = None,
    measured: Mapping[str, Moments] | None = None,
) -> str:
    """Return the table, with one row for all weights that differ in their layer only.

    Args:
        default_std: the standard deviation of weights for which no method has a rule.
        start: the model whose weights the run starts from. Their deviations are known once they are measured.
        measured: moments by name. If given, the table has these standard deviations, from the first to the last layer.
    """
    groups: dict[tuple[str, ...], list[tuple[Weight, float]]] = {}
    for weight in weights:
        draw, rule = initial_rule(weight, config, default_std)
        loaded = rule_in_words(weight, start, config)
        rule, drawn_std = (rule, draw.std) if loaded is None else (loaded, 0.0)
        in_training = "; ".join(filter(None, (method.training_rule(weight) for method in config.methods))) or "-"
        std = measured[weight.name].std if measured else drawn_std
        key = (_label(weight), rule, optimizer_rule(weight, config), in_training)
        groups.setdefault(key, []).append((weight, std))
    rows = [_HEADER]
    for (label, rule, optimizer, in_training), members in groups.items():
        shapes = sorted({"x".join(map(str, weight.shape)) for weight, _ in members})
        count, stds = str(len(members)), [std for _, std in members]
        rows.append((label, _layers(members), count, ", ".join(shapes), rule, _range(stds), optimizer, in_training))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _label(weight: Weight) -> str:
    """Return the role of a weight, with that of its owner for a weight that belongs to a matrix or a norm."""
    owner, _ = role_and_layer(f"{weight.name.rpartition('.')[0]}.weight")
    return weight.role if weight.role == owner else f"{weight.role} of {owner}"


def _layers(members: Sequence[tuple[Weight, float]]) -> str:
    layers = [weight.layer for weight, _ in members if weight.layer is not None]
    if not layers:
        return "-"
    return str(layers[0]) if len(set(layers)) == 1 else f"{min(layers)}-{max(layers)}"


def _range(stds: Sequence[float]) -> str:
    first, last = stds[0], stds[-1]
    if first == last == 0.0:
        return "-"
    return f"{first:.5f}" if abs(first - last) < 1e-9 else f"{first:.5f} .. {last:.5f}"
