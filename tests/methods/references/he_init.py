"""He initialization with WeSaR's gains (arXiv 2410.05052, Table 1)."""

from math import sqrt

from tests.support.dense import DenseLlama


def initial_std(name, shape, settings):
    if "embed_tokens" in name and not settings.tied:
        return 1.0
    inputs = shape[1]
    if "o_proj" in name:
        return sqrt(1 / (2 * settings.layers * inputs))
    if "down_proj" in name:
        return sqrt(2 / (2 * settings.layers * inputs))
    return sqrt(1 / inputs)


class Reference(DenseLlama):
    """Trains as any other."""
