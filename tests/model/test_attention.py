"""Attention without a mask: the values of transformers' own, without its look at the positions, and without a trace."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch.nn import functional as F
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen3Config

from pretrain.engine.build_model import model_class
from pretrain.model.attention import CAUSAL, choose_attention
from pretrain.model.config_json import save_config
from pretrain.model.evenkeel_llama import EvenkeelLlamaConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BACKBONES = {
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "qwen3": Qwen3Config(**SIZES),
    "evenkeel_llama": EvenkeelLlamaConfig(**SIZES, seednorm=True, qk_norm=True, attention_residuals=True),
}


@pytest.fixture(params=BACKBONES)
def model(request):
    torch.manual_seed(0)
    config = deepcopy(BACKBONES[request.param])
    return model_class(config)(config).train()


@pytest.fixture
def kernel_arguments(monkeypatch) -> list[tuple[Any, Any]]:
    """Return a list that grows by the mask and the flag of each call of torch's attention."""
    seen: list[tuple[Any, Any]] = []
    attention = F.scaled_dot_product_attention

    def spy(*given: Any, **more: Any) -> torch.Tensor:
        seen.append((more["attn_mask"], more["is_causal"]))
        return attention(*given, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def test_logits_and_gradients_are_those_of_the_stock_implementation(model) -> None:
    tokens = torch.randint(0, 61, (2, 31))
    parameters = list(model.parameters())
    expected = model(tokens, use_cache=False).logits
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    choose_attention(model, documents=False)
    found = model(tokens, use_cache=False).logits
    assert torch.equal(found, expected)
    for gradient, theirs in zip(torch.autograd.grad(found.square().sum(), parameters), expected_gradients, strict=True):
        assert torch.equal(gradient, theirs)


def test_no_positions_are_read_and_no_mask_is_made(model, kernel_arguments, monkeypatch) -> None:
    def read(positions: torch.Tensor) -> None:
        raise AssertionError("the positions are read, and the host waits for them")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", read)
    choose_attention(model, documents=False)
    model(torch.randint(0, 61, (2, 31)), use_cache=False)
    assert kernel_arguments == [(None, True)] * 2


def test_with_documents_the_mask_stays(model, kernel_arguments) -> None:
    choose_attention(model, documents=True)
    positions = torch.cat((torch.arange(20), torch.arange(11))).expand(2, -1)
    model(torch.randint(0, 61, (2, 31)), use_cache=False, position_ids=positions)
    masks = [mask for mask, _ in kernel_arguments]
    assert all(mask is not None and not mask[0, 0, 20:, :20].any() for mask in masks)


def test_another_implementation_is_left_as_it_is(model) -> None:
    model.set_attn_implementation("eager")
    choose_attention(model, documents=False)
    assert model.config._attn_implementation == "eager"


def test_the_name_is_not_saved(model, tmp_path) -> None:
    before = model.config.to_diff_dict()
    choose_attention(model, documents=False)
    assert model.config._attn_implementation == CAUSAL
    assert model.config.to_diff_dict() == before
    save_config(model.config, tmp_path)
    assert CAUSAL not in (tmp_path / "config.json").read_text()
    assert CAUSAL not in json.dumps(model.config.to_dict(), default=str)
    stock = AutoConfig.from_pretrained(tmp_path)
    assert model_class(stock)(stock).config._attn_implementation == "sdpa"
