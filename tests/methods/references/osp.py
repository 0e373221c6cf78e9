"""OSP: norms with one gain, a square matrix after the embedding and one before the head (arXiv 2506.19697)."""

from math import sqrt

from tests.support.dense import DenseLlama

FOLD = "round-off"
CONTROL = "model.embed_tokens.weight"
REFUSES_TIED = "an embedding and a head of their own"


def initial_std(name, shape, settings):
    return 1 / sqrt(settings.hidden) if "projection" in name else None


class Reference(DenseLlama):
    def gain(self, module):
        gain = super().gain(module)
        assert gain.shape == (1,) or "self_attn" in module
        return gain

    def embed(self, ids):
        return super().embed(ids) @ self.weights["model.embed_projection.weight"].T

    def logits(self, hidden):
        return super().logits(hidden @ self.weights["model.head_projection.weight"].T)
