"""Qwen2 and Qwen2.5 (arXiv 2407.10671): a LLaMA with biases of q, k and v, and none of o."""

from transformers import Qwen2Config

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_NORMS, Family

FAMILY = Family(
    name="qwen2",
    config_class=Qwen2Config,
    trained_class="Qwen2ForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches"}),
)
