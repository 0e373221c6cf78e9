"""Weight normalization: row i of a block's matrix is g_i w_i / |w_i| (arXiv 1602.07868); g starts at He's deviation."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"variance": 9e-5}


def initial_std(name, shape, settings):
    if name.startswith("model.layers."):
        return sqrt(OPTIONS["variance"])
    return 1.0 if "embed" in name and not settings.tied else sqrt(1 / settings.hidden)


def initial_value(name, settings):
    if not name.endswith("weight_scale"):
        return None
    return {"o_proj": sqrt(1 / (2 * settings.layers)), "down_proj": sqrt(1 / settings.layers)}.get(
        name.split(".")[-2], 1.0
    )


class Reference(DenseLlama):
    def matrix(self, module):
        w, g = super().matrix(module), self.weights.get(f"{module}.weight_scale")
        if g is None:
            return w
        return (g / (w * w).sum(1).sqrt()).diag() @ w
