"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm with biases, one matrix for q, k and v, an ungated MLP."""

from transformers import GPT2Config

from pretrain.model.families.base import Family

_IN_BLOCK = {
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "ln_1": "norm",
    "ln_2": "norm",
}

FAMILY = Family(
    name="gpt2",
    config_class=GPT2Config,
    trained_class="GPT2LMHeadModel",
    in_block=_IN_BLOCK,
    outside={"transformer.wte": "embed", "transformer.wpe": "position", "transformer.ln_f": "norm", "lm_head": "head"},
    has=frozenset({"pre_norm", "direct_branches"}),
    blocks="transformer.h",
    norms=("ln_1", "ln_2"),
    final_norm="transformer.ln_f",
    # Conv1D stores its weight as [in, out], nn.Linear as [out, in].
    input_major=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
)
