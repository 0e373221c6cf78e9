"""Attention Residuals in blocks: h = Σ a_i v_i, a = softmax_i(w · RMSNorm(v_i)) (arXiv 2603.15031, equations 2 to 6).

v_0 is the embedding, the others are the sums of the blocks so far; the first sub-layer of a block has nothing of its own
block to read. Four blocks of the tests' six sub-layers have 2, 2, 1 and 1 of them.
"""

import numpy as np
import torch

from tests.support.dense import DenseLlama

OPTIONS = {"blocks": 4}
EXPORTS = "EvenkeelLlamaForCausalLM"


def initial_value(name, settings):
    return 0.0 if name.endswith("query") else None


class Reference(DenseLlama):
    def read(self, values, query):
        v = torch.stack(values)
        keys = v / (v.square().mean(-1, keepdim=True) + self.settings.eps).sqrt()
        shares = torch.einsum("d,nbtd->nbt", self.weights[query], keys).softmax(0)
        return torch.einsum("nbt,nbtd->btd", shares, v)

    def sublayer(self, number, h):
        layer, is_mlp = divmod(number, 2)
        if is_mlp:
            return self.mlp(self.norm(h, f"model.layers.{layer}.post_attention_layernorm"), layer)
        return self.attention(self.norm(h, f"model.layers.{layer}.input_layernorm"), layer)

    def hidden(self, ids):
        sublayers = 2 * self.settings.layers
        values = [self.embed(ids)]
        for block in np.array_split(np.arange(sublayers), self.options["blocks"] or sublayers):
            partial = []
            for number in block.tolist():
                layer, is_mlp = divmod(number, 2)
                query = f"model.layers.{layer}.{'mlp' if is_mlp else 'attn'}_read.query"
                output = self.sublayer(number, self.read(values + partial, query))
                partial = [partial[0] + output] if partial else [output]
            values += partial
        return self.norm(self.read(values, f"model.layers.{self.settings.layers - 1}.output_read.query"), "model.norm")
