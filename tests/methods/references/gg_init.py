"""Generalized Gaussian initialization, here Laplace's: the variance is gain / outputs for every shape of the density."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"shape": 1.0, "gain": 1.5}


def initial_std(name, shape, settings):
    outputs = shape[0]
    return sqrt(1.5 / outputs)


class Reference(DenseLlama):
    """Trains as any other."""
