"""Residual scaling: the matrices that it multiplies, and its conflicts."""

from math import sqrt

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, build_model
from pretrain.model.export_edits import as_lazy

MODEL = LlamaConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    attention_bias=True,
    mlp_bias=True,
)


def config(*methods: str) -> Config:
    return Config.model_validate(
        {
            "name": "case",
            "model": {"family": "llama"},
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": 16, "global_batch_size": 1, "micro_batch_size": 1},
            "steps": 1,
            "optim": {"lr": 1e-3},
            "methods": [{"name": name} for name in methods],
            "deepspeed": {"zero_optimization": {"stage": 0}},
        }
    )


def test_matrices_and_biases_of_what_writes_to_the_stream_are_folded_to_the_bit():
    bound = bind_methods(config("residual_scaling"), MODEL)
    model = build_model(bound, MODEL, {"zero_optimization": {"stage": 0}}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    stored = {name: value.detach().clone() for name, value in model.named_parameters()}
    tensors = as_lazy(stored)
    bound.methods[0].fold(tensors, MODEL)
    stock = LlamaForCausalLM(MODEL).eval()
    stock.load_state_dict({name: load() for name, load in tensors.items()})
    tokens = torch.randint(0, 60, (2, 16), generator=generator)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    for name, tensor in stock.named_parameters():
        factor = 1 / sqrt(6) if ".o_proj." in name or ".down_proj." in name else 1.0
        torch.testing.assert_close(tensor, stored[name] * factor)


@pytest.mark.parametrize("other", ["residual_init", "small_init", "he_init", "depth_scaled_init", "lir"])
def test_a_second_damping_by_depth_is_refused(other):
    with pytest.raises(ValidationError, match=f"{other} already makes the residual branches start smaller"):
        config(other, "residual_scaling")


@pytest.mark.parametrize("other", ["layernorm_scaling", "attention_residuals", "wesar", "weight_norm", "sigma_reparam"])
def test_other_contradictions_are_refused(other):
    with pytest.raises(ValidationError, match="cannot be combined"):
        config("residual_scaling", other)


@pytest.mark.parametrize("other", ["xavier_init", "gg_init", "tvr", "qk_norm"])
def test_plain_initializations_and_what_leaves_the_stream_alone_are_not(other):
    assert len(config("residual_scaling", other).methods) == 2


@pytest.mark.parametrize(
    ("backbone", "o", "down", "up"),
    [("he", 1 / sqrt(24), sqrt(2 / 40), 1 / sqrt(24)), ("small", *[sqrt(2 / (5 * 24))] * 3)],
)
def test_a_backbone_is_drawn_without_its_own_damping(backbone, o, down, up):
    method = config("residual_scaling").methods[0].model_copy(update={"backbone": backbone})
    bound = bind_methods(config().model_copy(update={"methods": (method,)}), MODEL)
    found = {weight.role: bound.methods[0].init_std(weight) for weight in bound.methods[0].run.matrices.values()}
    assert (found["o"], found["down"], found["up"]) == pytest.approx((o, down, up))


def test_a_backbone_decides_the_initial_deviations():
    with pytest.raises(ValidationError, match="both decide"):
        Config.model_validate(
            config().model_dump()
            | {"methods": [{"name": "residual_scaling", "backbone": "he"}, {"name": "xavier_init"}]}
        )
