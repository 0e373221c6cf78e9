"""Qwen3 (arXiv 2505.09388): a LLaMA with RMSNorm of each head's queries and keys, and heads of a size of their own."""

from transformers import Qwen3Config

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_NORMS, QK_NORMS, Family

FAMILY = Family(
    name="qwen3",
    config_class=Qwen3Config,
    trained_class="Qwen3ForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS, **QK_NORMS},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches"}),
    whole_heads="each rank would have the gradient of its own heads only for the gains of queries and keys",
)
