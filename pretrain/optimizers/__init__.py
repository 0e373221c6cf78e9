"""The registry: the `OPTIMIZER` of every file in this folder, by the name that selects it in run files."""

from __future__ import annotations

import importlib
import pkgutil

import torch

from pretrain.optimizers.base import Algorithm, Layout, OptimKeys


def _load() -> dict[str, Algorithm]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [module.OPTIMIZER for module in modules if hasattr(module, "OPTIMIZER")]
    return {algorithm.name: algorithm for algorithm in sorted(found, key=lambda algorithm: algorithm.name)}


def algorithm_of(optimizer: torch.optim.Optimizer) -> Algorithm | None:
    """Return the algorithm whose class this optimizer is, None if it is of no class that this folder knows."""
    return next((each for each in OPTIMIZERS.values() if type(optimizer) is each.optimizer_class()), None)


OPTIMIZERS: dict[str, Algorithm] = _load()

__all__ = ["OPTIMIZERS", "Algorithm", "Layout", "OptimKeys", "algorithm_of"]
