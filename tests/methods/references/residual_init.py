"""GPT-2's residual initialization: σ / √(2N) for what writes to the stream, σ for the rest."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"std": 0.05}


def initial_std(name, shape, settings):
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    return sqrt(0.05**2 / (2 * settings.layers)) if writes else 0.05


class Reference(DenseLlama):
    """Trains as any other."""
