"""WeSaR: W̄ = α W for every matrix; W ~ N(0, σ²) and α = σ_He / σ at the start (arXiv 2410.05052, Table 1).

The embedding's σ_He is 1: stored values of deviation σ times 1/σ.
"""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"variance": 9e-5}
FOLD_TIED = "round-off"


def initial_std(name, shape, settings):
    return sqrt(OPTIONS["variance"])


def initial_value(name, settings):
    if not name.endswith("weight_scale"):
        return None
    width = {"down_proj": settings.intermediate}.get(name.split(".")[-2], settings.hidden)
    target = {
        "embed_tokens": 1.0,
        "o_proj": sqrt(1 / (2 * settings.layers * width)),
        "down_proj": sqrt(2 / (2 * settings.layers * width)),
    }.get(name.split(".")[-2], sqrt(1 / width))
    return target / sqrt(OPTIONS["variance"])


class Reference(DenseLlama):
    def matrix(self, module):
        return super().matrix(module) * self.weights[f"{module}.weight_scale"]
