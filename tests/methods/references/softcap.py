"""Softcap: c tanh(z / c) of the logits (arXiv 2408.00118). VaultGemma has the cap; it multiplies embeddings by sqrt(d)."""

from tests.support.dense import DenseLlama

OPTIONS = {"cap": 0.8}
EXPORTS = "VaultGemmaForCausalLM"
FOLD = "round-off"
CONTROL = "model.embed_tokens.weight"


class Reference(DenseLlama):
    def logits(self, hidden):
        cap = self.options["cap"]
        return cap * (super().logits(hidden) / cap).tanh()
