"""LayerNorm Scaling: what both norms of block l give is divided by √l, l from 1 (arXiv 2502.05795)."""

from math import sqrt

from tests.support.dense import DenseLlama

CONTROL = "model.layers.1.input_layernorm.weight"


class Reference(DenseLlama):
    def norm(self, x, module):
        normed = super().norm(x, module)
        parts = module.split(".")
        return normed / sqrt(int(parts[2]) + 1) if parts[1] == "layers" and "self_attn" not in parts else normed
