"""Initial values of all weights, and the audit of the values that were drawn."""

from __future__ import annotations

from functools import partial
from math import sqrt

from pretrain.config.schema import Config
from pretrain.model.layout import Weight
from pretrain.sharded import Moments, ShardedWeights
from pretrain.sharded.draws import Constant, Draw, ZeroRow


def initial_rule(weight: Weight, config: Config, default_std: float) -> tuple[Draw, str]:
    """Return the distribution of a weight at initialization, and the rule in words.

    Norm gains and trained factors are 1, biases 0. Matrices have the run's distribution, with the deviation that `init.std`
    or a method sets for them, else `default_std`. The row of an embedding that stands for padding is 0, as in transformers.
    """
    draw, rule = rule_of_rows(weight, config, default_std)
    if weight.padding_row is None:
        return draw, rule
    rows, columns = weight.shape
    return ZeroRow(draw, weight.padding_row, (rows, columns)), f"{rule}; row {weight.padding_row} (padding): 0"


def initial_draw(weight: Weight, config: Config, default_std: float) -> Draw:
    """Return the distribution of `initial_rule`."""
    return initial_rule(weight, config, default_std)[0]


def rule_of_rows(weight: Weight, config: Config, default_std: float) -> tuple[Draw, str]:
    """Return `initial_rule` for the rows that do not stand for padding."""
    for method in config.methods:
        if (draw := method.init_draw(weight)) is not None:
            return draw, ", ".join(filter(None, (draw.description, method.init_rule(weight))))
    if weight.role in ("bias", "norm", "scale"):
        constant = Constant(0.0 if weight.role == "bias" else 1.0)
        rules = (method.init_rule(weight) for method in config.methods)
        return constant, ", ".join(filter(None, (constant.description, *rules)))
    std, rule = default_std, f"initializer_range: {default_std:g}"
    if (given := config.init.deviations.get(weight.role)) is not None:
        std, rule = given, f"init.std: {given:g}"
    for method in config.methods:
        chosen = method.init_std(weight)
        if chosen is not None:
            std, rule = chosen, method.init_rule(weight) or method.name
    draw = config.init.draw(std)
    return draw, f"{draw.description}, {rule}"


def initialize_weights(weights: ShardedWeights, config: Config, default_std: float) -> dict[str, Moments]:
    """Fill every weight by its rule, check the result, and return the measured moments of each full weight. Collective.

    Args:
        weights: the weights of the engine.
        config: the run, with methods that `bind_methods` has bound.
        default_std: the standard deviation of matrices for which no method sets one.

    Raises:
        RuntimeError: the mean or deviation of a weight differs from its rule by more than sampling error.
    """

    rule = partial(initial_draw, config=config, default_std=default_std)
    weights.fill_(config.seed, rule)
    moments = weights.moments()
    for name, weight in weights.layout.items():
        _audit(weight, moments[name], rule(weight))
    return moments


def _audit(weight: Weight, measured: Moments, draw: Draw) -> None:
    """Allow six standard errors: one false alarm in 10^9 normal weights. Small weights with heavy tails have more."""
    count, mean, std = weight.numel, draw.mean, draw.std
    mean_error, std_error = std / sqrt(count), std * sqrt((draw.kurtosis - 1) / (4 * count))
    fits = (
        measured.count == count
        and abs(measured.mean - mean) <= 6 * mean_error + 1e-6 * abs(mean)  # float32
        and abs(measured.std - std) <= 6 * std_error + 1e-6 * std
    )
    if not fits:
        raise RuntimeError(
            f"initialization of {weight.name} went wrong: {measured.count} elements with mean {measured.mean:.3e} and "
            f"std {measured.std:.6f} were found where {count} with mean {mean:g} and std {std:.6f} were due"
        )
