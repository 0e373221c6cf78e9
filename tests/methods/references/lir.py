"""LIR: the variance of every matrix of block l is σ² / (l · scale_factor), l from 1 (arXiv 2503.17500)."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"initializer_range": 0.03, "scale_factor": 1.5}


def initial_std(name, shape, settings):
    if not name.startswith("model.layers."):
        return 0.03
    block = int(name.split(".")[2]) + 1
    return sqrt(0.03**2 / (block * 1.5))


class Reference(DenseLlama):
    """Trains as any other."""
