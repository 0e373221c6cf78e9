"""The closed FLOP formula against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pretrain.model.layout import describe_model
from pretrain.monitor.throughput import flops_per_token

LLAMA = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**LLAMA)),
        (LlamaForCausalLM, LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
        (GPT2LMHeadModel, GPT2Config(**GPT2)),
    ],
    ids=["llama", "llama with grouped keys and a tied head", "gpt2"],
)
def test_flops_equal_those_that_torch_counts(
    model_class: type[LlamaForCausalLM] | type[GPT2LMHeadModel], config: LlamaConfig | GPT2Config
) -> None:
    config._attn_implementation = "eager"
    model, tokens = model_class(config), torch.zeros(2, 48, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, use_cache=False).logits.sum().backward()
    assert flops_per_token(describe_model(model), config, 48) * 2 * 48 == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )
