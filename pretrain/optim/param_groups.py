"""The optimizer's parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pretrain.model.layout import Weight, describe_model
from pretrain.optim import muon

if TYPE_CHECKING:
    from pretrain.config.schema import Config, OptimSection
    from pretrain.methods.base import Method

_Answer = TypeVar("_Answer", bool, float)


def parameter_groups(model: torch.nn.Module, config: OptimSection, methods: Sequence[Method]) -> list[dict]:
    """The parameters by optimizer and weight decay, groups of matrices first, in the same order on every rank.

    Matrices decay and vectors (norms, biases, scales) do not, unless a method says otherwise: see `weight_decay`. In a
    run with Muon a group says `use_muon`, and `lr_scale` if that is so.

    Chosen by the layout: under ZeRO-3 a parameter's own `ndim` is that of a placeholder.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple, dict] = {}
    for weight in sorted(describe_model(model), key=_is_vector):
        options = _options(weight, config, methods)
        group = groups.setdefault((_is_vector(weight), *options.values()), {"params": [], **options})
        group["params"].append(parameters[weight.name])
    return list(groups.values())


def build_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """The run's optimizer over `parameter_groups`; DeepSpeed then swaps in its shards of the parameters.

    AdamW is torch's own, fused on GPUs: DeepSpeed's CPU Adam needs a C++ compiler and gains nothing here.
    """
    optim = config.optim
    groups = parameter_groups(model, optim, config.methods)
    adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": torch.cuda.is_available() or None}
    return muon.optimizer(groups, adam) if optim.name == "muon" else torch.optim.AdamW(groups, **adam)


def peak_lr(config: OptimSection, weight: Weight) -> float:
    """The highest learning rate of the optimizer that steps this weight."""
    return config.muon.lr or config.lr if config.name == "muon" and muon.steps(weight) else config.lr


def _is_vector(weight: Weight) -> bool:
    return len(weight.shape) != 2 or weight.role in ("norm", "bias", "scale")


def optimizer_rule(weight: Weight, config: Config) -> str:
    """Who steps this weight and how it decays, for the table that is printed at start."""
    by_muon = config.optim.name == "muon" and muon.steps(weight)
    decay = weight_decay(weight, _decay_of_matrices(config.optim, by_muon), config.methods)
    return ("muon" if by_muon else "adamw") + (f", decay {decay:g}" if decay else "")


def _decay_of_matrices(config: OptimSection, by_muon: bool) -> float:
    own = config.muon.weight_decay if by_muon else None
    return config.weight_decay if own is None else own


def _options(weight: Weight, config: OptimSection, methods: Sequence[Method]) -> dict[str, Any]:
    """What the group of this weight says: a group holds the weights that agree in it."""
    if config.name == "adamw":
        return {"weight_decay": weight_decay(weight, config.weight_decay, methods)}
    if not muon.steps(weight):
        return {"use_muon": False, "weight_decay": weight_decay(weight, config.weight_decay, methods)}
    decay = weight_decay(weight, _decay_of_matrices(config, by_muon=True), methods)
    return {"use_muon": True, **muon.group_options(weight, config, decay)}


def weight_decay(weight: Weight, of_matrices: float, methods: Sequence[Method]) -> float:
    """The weight decay of one weight: `of_matrices` if it is a matrix, 0 if not, unless methods say otherwise.

    Whether a weight decays and by how much are two questions. Of several methods that answer one, the last decides.
    """
    decays = _last((method.decays(weight) for method in methods), default=not _is_vector(weight))
    return _last((method.weight_decay(weight) for method in methods), default=of_matrices) if decays else 0.0


def _last(answers: Iterable[_Answer | None], default: _Answer) -> _Answer:
    """The last answer that is none of None."""
    return reduce(lambda found, answer: found if answer is None else answer, answers, default)
