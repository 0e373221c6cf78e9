"""Xavier initialization, gain 1: the variance is 2 / (inputs + outputs), for embeddings as for any matrix."""

from math import sqrt

from tests.support.dense import DenseLlama


def initial_std(name, shape, settings):
    return sqrt(2 / sum(shape))


class Reference(DenseLlama):
    """Trains as any other."""
