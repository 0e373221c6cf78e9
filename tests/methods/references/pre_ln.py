"""Pre-LN: LayerNorm without a bias wherever Llama has an RMSNorm (arXiv 2002.04745)."""

from torch.nn import functional as F

from tests.support.dense import DenseLlama

FOLD = "round-off"
CONTROL = "model.layers.1.self_attn.o_proj.weight"


class Reference(DenseLlama):
    def norm(self, x, module):
        if "self_attn" in module:
            return super().norm(x, module)
        return F.layer_norm(x, x.shape[-1:], self.gain(module), eps=self.settings.eps)
