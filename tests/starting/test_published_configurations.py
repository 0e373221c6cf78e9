"""Configurations as published models have them, in the spellings of their time: a run takes over what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pretrain.config.schema import Config
from pretrain.engine.build_model import hf_config
from pretrain.starting import model_of
from tests.support.corpus import Corpus, tiny
from tests.support.tiny_engines import TinyTokenizer

COMMON = {"architectures": ["X"], "transformers_version": "4.40.0", "use_cache": True, "initializer_range": 0.02}
LLAMA = {
    **COMMON,
    "model_type": "llama",
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": {
        **LLAMA,
        **sizes(2048, 8192, 16, 32, 8, 128256),
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2 135M": {
        **LLAMA,
        **sizes(576, 1536, 30, 9, 3, 49152),
        "is_llama_config": True,
        "rope_interleaved": False,
        "max_position_embeddings": 8192,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Llama 2 with linear scaling": {
        **LLAMA,
        **sizes(256, 512, 2, 4, 4, 32000),
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "Qwen2.5 0.5B": {
        **COMMON,
        **sizes(896, 4864, 24, 14, 2, 151936),
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
        "tie_word_embeddings": True,
    },
    "Qwen3 0.6B": {
        **COMMON,
        **sizes(1024, 3072, 28, 16, 8, 151936),
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "Mistral 7B v0.3": {
        **COMMON,
        **sizes(4096, 14336, 32, 32, 8, 32768),
        "model_type": "mistral",
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Granite 3.1 2B": {
        **COMMON,
        **sizes(2048, 8192, 40, 32, 8, 49152),
        "model_type": "granite",
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "max_position_embeddings": 131072,
        "pad_token_id": 0,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
    "OLMo 2 1B": {
        **COMMON,
        **sizes(2048, 8192, 16, 16, 16, 100352),
        "model_type": "olmo2",
        "max_position_embeddings": 4096,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "AFM 4.5B": {
        **COMMON,
        **sizes(2560, 18432, 36, 20, 4, 128004),
        "model_type": "arcee",
        "head_dim": 128,
        "hidden_act": "relu2",
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 20.0,
            "mscale": 1.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "GPT-2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
}
# Of the run's tokenizer, of the library, or without effect on what is computed.
NOT_COMPARED = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "architectures",
    "transformers_version",
    "dtype",
    "use_cache",
}
NOT_COMPARED |= {"task_specific_params", "n_ctx", "is_llama_config", "rope_interleaved", "use_mrope", "_name_or_path"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_has_what_transformers_reads(corpus: Corpus, tmp_path: Path, name: str) -> None:
    content = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = {"family": content["model_type"], "init_from": str(tmp_path)}
    run = model_of(Config.model_validate({**tiny(corpus), "name": "run", "methods": [], "model": model}))
    found = hf_config(run, TinyTokenizer(50)).to_dict()  # type: ignore[arg-type]
    expected = AutoConfig.from_pretrained(tmp_path).to_dict()
    (expected.get("rope_parameters") or {}).pop("type", None)  # an older name of rope_type, kept beside it
    assert {key: found.get(key) for key in expected if key not in NOT_COMPARED} == {
        key: value for key, value in expected.items() if key not in NOT_COMPARED
    }
