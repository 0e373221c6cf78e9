"""Granite (IBM, 2024): a LLaMA with four factors, as in muP: of the embedding, of attention, of branches and of logits.

    x = embedding_multiplier E[t];   x ← x + residual_multiplier f(Norm(x));   scores = attention_multiplier q k;
    logits = U h / logits_scaling

Those that are not given are 1, but attention_multiplier is 1/√head_dim then, as in every other family. (The class would
take 1 for it too.)
"""

from collections.abc import Mapping
from typing import Any

from transformers import GraniteConfig

from pretrain.model.families.base import LLAMA_ATTENTION, LLAMA_MLP, LLAMA_NORMS, Family


def _usual_attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = (fields.get(name, getattr(GraniteConfig, name)) for name in ("hidden_size", "num_attention_heads"))
    return {"attention_multiplier": (hidden // heads) ** -0.5}


FAMILY = Family(
    name="granite",
    config_class=GraniteConfig,
    trained_class="GraniteForCausalLM",
    in_block={**LLAMA_ATTENTION, **LLAMA_MLP, **LLAMA_NORMS},
    has=frozenset({"pre_norm", "rms_norm", "direct_branches"}),
    defaults=_usual_attention,
)
