"""Stock models of every family with arbitrary weights, saved by transformers: what runs start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pretrain.model.families import FAMILIES
from tests.support.tiny_engines import VOCABULARY

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Not the defaults of the classes: what a run does not take over shows.
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.05,
}
GPT2_SIZES = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY, "resid_pdrop": 0.0}
GPT2_SIZES |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-4, "bos_token_id": 1, "eos_token_id": 2}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "mistral": {"sliding_window": 5},
    "llama": {"attention_bias": True, "mlp_bias": True},
}


def stock_model(family: str, **fields: Any) -> PreTrainedModel:
    """Return a model of transformers, float32, with weights that no initialization gives: no gain is 1, no bias 0."""
    sizes = GPT2_SIZES if family == "gpt2" else {**SIZES, **OF_FAMILY.get(family, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(FAMILIES[family].name, **{**sizes, **fields}))
    generator = torch.Generator().manual_seed(len(family))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.copy_(1 + 0.2 * noise if is_gain else 0.15 * noise)
    model.tie_weights()
    return model.eval()


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Save such a model as transformers does, and return its folder."""
    model = stock_model(family, **fields)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder
