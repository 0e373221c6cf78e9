"""Residual scaling: y = x + f(Norm(x)) / sqrt(2N), here as it is written, on the outputs of o and down."""

from math import sqrt

from tests.support.dense import DenseLlama


class Reference(DenseLlama):
    def linear(self, x, module):
        y = super().linear(x, module)
        return y / sqrt(2 * self.settings.layers) if module.endswith(("o_proj", "down_proj")) else y
