"""The closed FLOP formula against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pretrain.model.layout import describe_model
from pretrain.monitor.throughput import Throughput, flops_per_token, peak_flops

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


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
        ("NVIDIA H100 PCIe", "bf16", False, 756e12),
        ("NVIDIA H100 NVL", "bf16", False, 835e12),
        ("NVIDIA H200 NVL", "fp16", True, 835e12),
        ("NVIDIA H200", "fp32", False, 67e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156e12),
        ("NVIDIA GeForce RTX 3090", "bf16", False, None),
    ],
)
def test_a_run_is_held_against_the_peak_of_its_device_and_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tf32: bool, peak: float | None
) -> None:
    """The figures are those of the vendors' data sheets, without sparsity."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        assert peak_flops(precision) == peak
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_utilization_is_reported_without_a_peak() -> None:
    assert peak_flops("bf16") is None or torch.cuda.is_available()
    throughput = Throughput(lambda step: 100 * step, flops_per_token=10.0, world_size=2, step=0, peak=500.0)
    pace = throughput.lap(step=3, total_steps=10, waited_s=0.0)
    assert pace.mfu == pytest.approx(pace.tokens_per_s * 10.0 / 1000.0)
    assert Throughput(lambda step: 100 * step, 10.0, 2, step=0, peak=None).lap(3, 10, 0.0).mfu is None
