"""The attention of models in training: causal by a flag of the kernel instead of by a mask.

transformers makes a mask in every forward pass, and reads from the device whether one is needed: the host waits there. It
makes none for an attention function under a name that it does not know. The function here is transformers' own, which
without a mask tells torch's kernel that attention is causal. The values are the same.

The name is set on models in training only. Configurations are saved without it, and exports are stock models.
"""

from __future__ import annotations

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "evenkeel_causal"

AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def choose_attention(model: PreTrainedModel, documents: bool) -> None:
    """Set the attention of a model that is about to be trained.

    Args:
        model: a causal language model of transformers.
        documents: whether attention must end with each document. The stock implementation keeps its mask then.
    """
    if not documents and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CAUSAL)
