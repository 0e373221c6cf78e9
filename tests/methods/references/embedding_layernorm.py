"""Embedding LayerNorm: the stream starts as LayerNorm(E[t]); a tied head keeps E (arXiv 2312.16903)."""

from tests.support.dense import DenseLlama

CONTROL = "model.embed_tokens.weight"


class Reference(DenseLlama):
    def embed(self, ids):
        rows = super().embed(ids)
        centred = rows - rows.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        gain, bias = (self.weights[f"model.embed_tokens.norm_{kind}"] for kind in ("weight", "bias"))
        return scaled * gain + bias
