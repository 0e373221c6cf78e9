"""qk-norm: RMSNorm over the values of each head of q and k, before the rotation, gains shared by the heads."""

from tests.support.dense import DenseLlama

EXPORTS = "Qwen3ForCausalLM"
CONTROL = "model.layers.1.self_attn.q_norm.weight"


class Reference(DenseLlama):
    def queries_and_keys(self, q, k, layer):
        attention = f"model.layers.{layer}.self_attn"
        return self.norm(q, f"{attention}.q_norm"), self.norm(k, f"{attention}.k_norm")
