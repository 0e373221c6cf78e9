"""Embedding gradient shrink: α E[t] + (1 - α) stopped E[t] (arXiv 2210.02414, section 2.3)."""

from tests.support.dense import DenseLlama

OPTIONS = {"alpha": 0.03}


class Reference(DenseLlama):
    def embed(self, ids):
        alpha, rows = self.options["alpha"], super().embed(ids)
        return alpha * rows + (1 - alpha) * rows.detach()
