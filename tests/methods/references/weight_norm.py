"""Weight normalization: row i of a block's matrix is g_i w_i / |w_i| (arXiv 1602.07868); g starts at He's deviation."""

from math import sqrt

from tests.support.dense import DenseLlama

OPTIONS = {"variance": 9e-5}


def initial_std(name, shape, facts):
    if name.startswith("model.layers."):
        return sqrt(OPTIONS["variance"])
    return 1.0 if "embed" in name and not facts.tied else sqrt(1 / facts.hidden)


def initial_value(name, facts):
    if not name.endswith("weight_scale"):
        return None
    return {"o_proj": sqrt(1 / (2 * facts.layers)), "down_proj": sqrt(1 / facts.layers)}.get(name.split(".")[-2], 1.0)


class Reference(DenseLlama):
    def matrix(self, module):
        w, g = super().matrix(module), self.weights.get(f"{module}.weight_scale")
        if g is None:
            return w
        return (g / (w * w).sum(1).sqrt()).diag() @ w
