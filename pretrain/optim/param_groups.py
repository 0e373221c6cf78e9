"""The run's optimizer, its parameter groups, and the weight decay of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pretrain.model.layout import Weight, describe_model
from pretrain.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from pretrain.config.optim_section import OptimSection
    from pretrain.config.schema import Config
    from pretrain.methods.base import Method

_Answer = TypeVar("_Answer", bool, float)


def parameter_groups(model: torch.nn.Module, config: OptimSection, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the parameters in groups of the same optimizer and options, matrices first, in one order on every rank.

    Matrices decay and vectors (norms, biases, scales) do not, unless a method decides otherwise: see `weight_decay`. The
    layout distinguishes them, because under ZeRO-3 a parameter's own `ndim` is that of a placeholder.

    Args:
        model: the model that is trained.
        config: the run's `optim` section.
        methods: the run's methods.

    Returns:
        torch's parameter groups, with what the optimizer's `group_options` put into them.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for weight in sorted(describe_model(model), key=_is_vector):
        options = _options(weight, config, methods)
        group = groups.setdefault((_is_vector(weight), *options.values()), {"params": [], **options})
        group["params"].append(parameters[weight.name])
    return list(groups.values())


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the run's optimizer over `parameter_groups`. DeepSpeed then replaces the parameters by its shards."""
    groups = parameter_groups(model, config.optim, config.methods)
    return OPTIMIZERS[config.optim.name].build(groups, config.optim)


def peak_lr(config: OptimSection, weight: Weight) -> float:
    """Return the highest learning rate of the optimizer that steps this weight."""
    return OPTIMIZERS[config.name].of_weight(weight).peak_lr(config)


def _is_vector(weight: Weight) -> bool:
    return len(weight.shape) != 2 or weight.role in ("norm", "bias", "scale")


def optimizer_rule(weight: Weight, config: Config) -> str:
    """Return the optimizer and the decay of this weight in words, for the table that is printed at start."""
    algorithm = OPTIMIZERS[config.optim.name].of_weight(weight)
    decay = weight_decay(weight, algorithm.decay_of_matrices(config.optim), config.methods)
    return f"{algorithm.name}, decay {decay:g}" if decay else algorithm.name


def _options(weight: Weight, config: OptimSection, methods: Sequence[Method]) -> dict[str, Any]:
    """Return the options of this weight's group. A group holds the weights with equal options."""
    optimizer = OPTIMIZERS[config.name]
    decay = weight_decay(weight, optimizer.of_weight(weight).decay_of_matrices(config), methods)
    return optimizer.group_options(weight, config, decay)


def weight_decay(weight: Weight, of_matrices: float, methods: Sequence[Method]) -> float:
    """Return the weight decay of one weight.

    A matrix decays by `of_matrices` and another weight does not decay, unless methods decide otherwise. Their hooks
    `decays` and `weight_decay` decide whether a weight decays and by how much. Of several methods that answer one of the
    two, the last decides.
    """
    decays = _last((method.decays(weight) for method in methods), default=not _is_vector(weight))
    return _last((method.weight_decay(weight) for method in methods), default=of_matrices) if decays else 0.0


def _last(answers: Iterable[_Answer | None], default: _Answer) -> _Answer:
    """Return the last answer that is not None, else the default."""
    return reduce(lambda last, answer: last if answer is None else answer, answers, default)
