"""The registry: every `Method` in this folder, found by its file, sorted by the name that selects it in YAML."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from pretrain.methods.base import Method, RunContext
from pretrain.methods.pairs import Clash, allowed_in, allowed_in_vain, clashes_of, decisions_that_clash


def _load() -> dict[str, type[Method]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted((cls.model_fields["name"].default, cls) for cls in _concrete(Method)))


def _concrete(base: type[Method]) -> Iterator[type[Method]]:
    """Yield every method class below `base`. A class without a name of its own only lends its hooks to others."""
    for cls in base.__subclasses__():
        if isinstance(cls.model_fields["name"].default, str):
            yield cls
        yield from _concrete(cls)


REGISTRY: dict[str, type[Method]] = _load()

__all__ = [
    "REGISTRY",
    "Clash",
    "Method",
    "RunContext",
    "allowed_in",
    "allowed_in_vain",
    "clashes_of",
    "decisions_that_clash",
]
