"""LLaMA (Touvron et al. 2023, arXiv 2302.13971; with grouped queries and rope scaling as in Llama 3)."""

from transformers import LlamaConfig

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_NORMS, Family

FAMILY = Family(
    name="llama",
    config_class=LlamaConfig,
    trained_class="LlamaForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches", "llama_block"}),
)
