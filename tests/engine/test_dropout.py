"""Dropout: a GPT-2 trains with Hugging Face's 0.1 unless the run file sets another, and the plan reports it."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.engine.build_model import build_model
from pretrain.trainer.plan import make_plan
from pretrain.trainer.plan_summary import describe_plan
from tests.support.corpus import Corpus, tiny

GPT2 = {"family": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
NONE = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (GPT2, "dropout   model.embd_pdrop 0.1, model.attn_pdrop 0.1, model.resid_pdrop 0.1 in training"),
        ({**GPT2, **NONE, "attn_pdrop": 0.3}, "dropout   model.attn_pdrop 0.3 in training"),
        ({**GPT2, **NONE}, None),
        ({}, None),
        ({"attention_dropout": 0.2}, "dropout   model.attention_dropout 0.2 in training"),
    ],
)
def test_the_plan_says_whether_the_model_trains_with_dropout(corpus: Corpus, model: dict, said: str | None) -> None:
    content = tiny(corpus)
    content["model"] = model if "family" in model else {**content["model"], **model}
    plan = make_plan(Config.model_validate(content), world_size=1)
    lines = describe_plan(plan).splitlines()
    assert [line for line in lines if line.startswith("dropout")] == ([said] if said else [])

    trained = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}}).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = torch.randint(0, 100, (2, 16), generator=generator)
    first, second = (trained(ids).logits for _ in range(2))
    assert torch.equal(first, second) == (said is None)
