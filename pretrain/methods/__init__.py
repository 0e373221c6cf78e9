"""The registry: every `Method` in this folder, found by its file; YAML picks one by its name."""

from __future__ import annotations

import importlib
import pkgutil

from pretrain.methods.base import Method


def _load() -> dict[str, type[Method]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {cls.model_fields["name"].default: cls for cls in Method.__subclasses__()}


REGISTRY: dict[str, type[Method]] = _load()

__all__ = ["REGISTRY", "Method"]
