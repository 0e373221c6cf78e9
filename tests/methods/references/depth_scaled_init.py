"""Depth-scaled initialization: σ / √(2l) for what block l writes to the stream, l from 1, σ for the rest."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"std": 0.05}


def initial_std(name, shape, settings):
    if not name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.05
    block = int(name.split(".")[2]) + 1
    return sqrt(0.05**2 / (2 * block))


class Reference(DenseLlama):
    """Trains as any other."""
