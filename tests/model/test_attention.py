"""Attention without a mask: the values of transformers' own, without its look at the positions, and without a trace."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AutoConfig, GPT2Config, LlamaConfig, Qwen3Config

from pretrain.engine.build_model import model_class
from pretrain.errors import UserError
from pretrain.model.attention import CAUSAL, DOCUMENTS, choose_attention, document_mask
from pretrain.model.config_json import save_config
from pretrain.model.evenkeel_llama import EvenkeelLlamaConfig
from tests.support.spy import Waits

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


def test_a_mask_of_padding_is_refused_not_ignored(model) -> None:
    tokens = torch.randint(0, 61, (2, 7))
    choose_attention(model, documents=False)
    with pytest.raises(ValueError, match="attends without a mask"):
        model(tokens, attention_mask=torch.ones_like(tokens))
    model.set_attn_implementation("sdpa")
    model(tokens, attention_mask=torch.ones_like(tokens))


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


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in each]) for each in lengths])


# Documents that end within blocks of 128 tokens and at their ends, that fill several, and that are one token long.
LENGTHS = {
    24: [[9, 1, 14], [24]],
    300: [[128, 128, 44], [1, 299], [100, 100, 100], [300]],
    640: [[640], [128, 512], [5, 3, 400, 232], [127, 1, 1, 511]],
}


@pytest.mark.parametrize("length", LENGTHS)
def test_the_blocks_of_a_mask_are_those_that_torch_finds_by_looking_at_every_pair(length: int) -> None:
    positions = positions_of(LENGTHS[length])
    documents = (positions == 0).cumsum(1)
    expected = create_block_mask(
        lambda sequence, head, query, key: (documents[sequence, query] == documents[sequence, key]) & (query >= key),
        len(positions),
        None,
        length,
        length,
        device="cpu",
    )
    found = document_mask(positions)
    assert found.shape == expected.shape
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_making_a_mask_waits_for_nothing() -> None:
    positions = positions_of(LENGTHS[300])
    with Waits() as waits:
        document_mask(positions)
    assert not waits.places


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_over_several_blocks_is_that_of_each_document_alone(
    length: int, flex_attention_with_gradients: None
) -> None:
    torch.manual_seed(0)
    lengths = LENGTHS[length]
    query, key, value = (
        torch.randn(len(lengths), heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    expected = torch.empty_like(query)
    for row, each in enumerate(lengths):
        ends = torch.tensor(each).cumsum(0).tolist()
        for first, end in zip([0, *ends], ends, strict=False):
            inside = (slice(row, row + 1), slice(None), slice(first, end))
            expected[inside] = F.scaled_dot_product_attention(
                query[inside], key[inside], value[inside], is_causal=True, scale=0.3, enable_gqa=True
            )
    attend = AttentionInterface()[DOCUMENTS]
    mask = document_mask(positions_of(lengths))
    found, _ = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad((weights * each).sum(), (query, key, value)) for each in (found.transpose(1, 2), expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow  # torch compiles a kernel in C++. Its kernels for CPUs have no gradients.
def test_the_compiled_kernel_computes_the_same() -> None:
    positions = positions_of(LENGTHS[300])
    query, key, value = (torch.randn(len(positions), 4, 300, 16) for _ in range(3))
    documents = (positions == 0).cumsum(1)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    found, _ = AttentionInterface()[DOCUMENTS](torch.nn.Module(), query, key, value, document_mask(positions))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None])
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_are_attended_to_by_blocks_where_that_can_be_compiled(family: str) -> None:
    def chosen(flex: bool, **fields: float) -> str:
        config = deepcopy(BACKBONES[family])
        config.update(fields)
        model = model_class(config)(config)
        choose_attention(model, documents=True, flex=flex)
        return model.config._attn_implementation

    assert chosen(flex=True) == DOCUMENTS
    assert chosen(flex=False) == "sdpa"
    dropout = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    assert chosen(flex=True, **{dropout: 0.1}) == "sdpa"


def test_an_implementation_that_lets_documents_see_each_other_is_refused(model) -> None:
    """Hugging Face's flash_attention_2 reads positions only in batches of one sequence."""
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match=r"data\.document_attention does not go with .* flash_attention_2"):
        choose_attention(model, documents=True)
    choose_attention(model, documents=False)


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
