"""The registry: the `FAMILY` of every file in this folder, by the name that selects it in run files."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from pretrain.model.families.base import NEEDS, Family, Need


def _load() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.name: family for family in sorted(found, key=lambda family: family.name)}


def missing(family: str, needs: Iterable[Need]) -> list[Need]:
    """Return those of `needs` that the family of this name does not have."""
    return sorted(set(needs) - FAMILIES[family].has)


def families_with(needs: Iterable[Need]) -> list[str]:
    """Return the names of the families that have all of `needs`."""
    return [name for name in FAMILIES if not missing(name, needs)]


FAMILIES: dict[str, Family] = _load()

__all__ = ["FAMILIES", "NEEDS", "Family", "Need", "families_with", "missing"]
