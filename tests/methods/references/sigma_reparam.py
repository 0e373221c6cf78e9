"""σReparam: W̄ = γ W / σ, σ = uᵀ W v by one power iteration before each step, 20 before the first (arXiv 2303.06296)."""

from math import sqrt

import torch

from tests.support.dense import DenseLlama

OPTIONS = {"variance": 9e-4}


def initial_std(name, shape, settings):
    return sqrt(OPTIONS["variance"]) if name.startswith("model.layers.") else None


class Reference(DenseLlama):
    def __init__(self, settings, initial, options):
        super().__init__(settings, initial, options)
        modules = [name.removesuffix(".weight_scale") for name in initial if name.endswith(".weight_scale")]
        self.u = {module: torch.ones(len(initial[f"{module}.weight"]), dtype=torch.float64) for module in modules}
        self.v = {}
        for _ in range(20):
            self.iterate()

    @torch.no_grad()
    def iterate(self):
        for module in self.u:
            w = self.weights[f"{module}.weight"].double()
            self.v[module] = w.T @ self.u[module]
            self.v[module] /= self.v[module].norm()
            self.u[module] = w @ self.v[module]
            self.u[module] /= self.u[module].norm()

    def before_step(self):
        self.iterate()

    def matrix(self, module):
        w = super().matrix(module)
        if module not in self.u:
            return w
        sigma = self.u[module].float() @ w @ self.v[module].float()
        return self.weights[f"{module}.weight_scale"] * w / sigma
