"""Mistral (arXiv 2310.06825): a LLaMA whose attention may be limited to a sliding window.

A window of 4,096 tokens is the default of the class. Here attention is whole unless the run file says otherwise.
"""

from transformers import MistralConfig

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_NORMS, Family

FAMILY = Family(
    name="mistral",
    config_class=MistralConfig,
    trained_class="MistralForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches"}),
    defaults=lambda fields: {"sliding_window": None},
)
