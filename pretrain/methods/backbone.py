"""Initializations that a reparameterized matrix may start as: `backbone: he` or `small`. Shared by several methods."""

from __future__ import annotations

from typing import Literal

from pretrain.methods.base import RunContext
from pretrain.methods.he_init import he_rule, he_std
from pretrain.methods.small_init import small_rule, small_std
from pretrain.model.layout import Weight

Backbone = Literal["he", "small"]


def backbone_std(backbone: Backbone, weight: Weight, run: RunContext, tied: bool) -> float:
    """Return the standard deviation that He's or Small's initialization would give this matrix. `tied`: see `he_std`."""
    return he_std(weight, run.layers, tied) if backbone == "he" else small_std(weight, run.hidden_size, run.layers)


def backbone_rule(backbone: Backbone, weight: Weight, tied: bool) -> str:
    """Return the rule of `backbone_std` in words."""
    return he_rule(weight, tied) if backbone == "he" else small_rule(weight)
