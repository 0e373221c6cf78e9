"""Arcee (AFM, 2025): a LLaMA with an ungated MLP, by default with ReLU². With `hidden_act: gelu` it is WeSaR's architecture."""

from transformers import ArceeConfig

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_NORMS, Family

FAMILY = Family(
    name="arcee",
    config_class=ArceeConfig,
    trained_class="ArceeForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_NORMS, "mlp.up_proj": "up", "mlp.down_proj": "down"},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches"}),
)
