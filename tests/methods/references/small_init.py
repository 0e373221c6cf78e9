"""Small initialization: √(2 / 5d), what writes to the stream 1/√(2N) of it (arXiv 1910.05895; 2410.05052, section 2)."""

from math import sqrt

from tests.support.dense import DenseLlama


def initial_std(name, shape, settings):
    variance = 2 / (5 * settings.hidden)
    if "o_proj" in name or "down_proj" in name:
        variance /= 2 * settings.layers
    return sqrt(variance)


class Reference(DenseLlama):
    """Trains as any other."""
