"""OLMo 2 (arXiv 2501.00656): norms after each sub-layer instead of before it, and of all queries and all keys at once.

x ← x + Norm(f(x))
"""

from transformers import Olmo2Config

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, QK_NORMS, Family

FAMILY = Family(
    name="olmo2",
    config_class=Olmo2Config,
    trained_class="Olmo2ForCausalLM",
    in_block={
        **LLAMA_ATTENTION,
        **LLAMA_MLP,
        **QK_NORMS,
        "post_attention_layernorm": "norm",
        "post_feedforward_layernorm": "norm",
    },
    has=frozenset({"rms_norm"}),
    norms=(),
    defaults=lambda fields: {"pad_token_id": None},  # of the class: 1, which may be a token of the run's vocabulary
    whole_heads="the norms of queries and keys are over all heads",
)
