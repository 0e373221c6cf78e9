"""Classes that change their logits after the head: the loss is the cross-entropy of their own logits, or they are refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pretrain.errors import UserError
from pretrain.model.class_logits import AfterHead, after_head_of, require_known_logits, require_own_loss
from pretrain.model.loss import LossHead, loss_head, with_loss_head

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 9,
}
PLAIN = [LlamaConfig(**SHAPE), Qwen3Config(**SHAPE), GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)]
CHANGED = [
    GraniteConfig(**SHAPE, logits_scaling=8.0),
    GraniteConfig(**SHAPE),
    CohereConfig(**SHAPE, logit_scale=0.5),
    Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
]
kind = pytest.mark.parametrize("hf_config", PLAIN + CHANGED, ids=lambda hf_config: hf_config.model_type)


def trained(hf_config: PreTrainedConfig, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = with_loss_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)])(hf_config).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


@kind
@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_the_loss_is_that_of_the_stock_class_and_so_are_its_gradients(hf_config, chunk_tokens, monkeypatch):
    monkeypatch.setattr(LossHead, "chunk_logits", chunk_tokens * 9)
    model = trained(hf_config)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)](hf_config).eval()
    stock.load_state_dict(model.state_dict())
    ids = torch.randint(0, 9, (2, 11))
    expected = F.cross_entropy(stock(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    found = model(ids[:, :-1], targets=ids[:, 1:])["total"]
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


@kind
def test_a_class_of_which_the_loss_knows_all_passes_and_is_left_as_it_was(hf_config):
    model = trained(hf_config, "meta")
    require_known_logits(model, loss_head(model).after_head)
    assert "forward" not in vars(model.base_model)
    assert "forward" not in vars(loss_head(model))


@pytest.mark.parametrize(
    ("hf_config", "known"),
    [
        (CHANGED[0], None),
        (CHANGED[0], AfterHead(divisor=4.0)),
        (CHANGED[2], None),
        (CHANGED[3], None),
        (CHANGED[3], AfterHead(cap=2.5)),
        (PLAIN[0], AfterHead(divisor=8.0)),
    ],
)
def test_a_class_that_does_something_else_to_its_logits_is_refused(hf_config, known):
    with pytest.raises(UserError, match="changes the logits after its head"):
        require_known_logits(trained(hf_config, "meta"), known)


def test_a_class_that_scales_what_its_head_reads_is_refused():
    model = trained(PLAIN[0], "meta")
    stock = model.forward
    head = loss_head(model)
    model.forward = lambda ids, **more: SimpleNamespace(logits=head(stock(ids, **more).logits))
    with pytest.raises(UserError, match="before its head reads it"):
        require_known_logits(model, None)


@kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_the_probe_passes_only_if_it_is_the_models_own(hf_config, dtype):
    torch.manual_seed(1)
    model = trained(hf_config).to(dtype).train()
    ids = torch.randint(0, 9, (2, 100))
    require_own_loss(model, ids)
    assert model.training
    head = loss_head(model)
    head.after_head = AfterHead(divisor=1.5)  # nothing here divides by it
    with pytest.raises(UserError, match=re.escape(type(model).__name__)):
        require_own_loss(model, ids)


def test_a_model_with_nan_is_not_judged():
    model = trained(PLAIN[0])
    next(model.parameters()).data.fill_(float("nan"))
    require_own_loss(model, torch.randint(0, 9, (2, 10)))


def test_neutral_values_change_nothing():
    assert after_head_of(GraniteConfig(**SHAPE)) is None
    assert after_head_of(PLAIN[0]) is None
