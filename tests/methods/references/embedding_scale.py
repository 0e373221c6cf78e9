"""Scaled embedding: the stream starts as √d E[t]; a tied head does not see the factor (arXiv 2312.16903)."""

from math import sqrt

from tests.support.dense import DenseLlama

EXPORTS_TIED = "GraniteForCausalLM"
FOLD_GPT2 = "round-off"
CONTROL = "model.embed_tokens.weight"


class Reference(DenseLlama):
    def embed(self, ids):
        return sqrt(self.settings.hidden) * super().embed(ids)
