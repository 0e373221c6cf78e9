"""Every weight of every family has a role, a layer and the right fans, and an unknown one is refused."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pretrain.errors import UserError
from pretrain.model.layout import describe, describe_model, full_shape, role_and_layer


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def test_llama_roles_and_layers_count_from_one(llama):
    weights = {weight.name: weight for weight in describe_model(llama)}
    assert len(weights) == len(list(llama.parameters()))
    assert weights["model.layers.0.self_attn.q_proj.weight"].layer == 1
    assert weights["model.layers.2.mlp.down_proj.weight"].role == "down"
    assert weights["model.layers.1.self_attn.o_proj.bias"].role == "bias"
    assert weights["model.embed_tokens.weight"].layer is None
    assert sum(weight.in_block_matrix for weight in weights.values()) == 3 * 7


def test_gpt2_conv1d_matrices_are_covered_with_their_fans_the_right_way_round(gpt2):
    weights = {weight.name: weight for weight in describe_model(gpt2)}
    up, qkv = weights["transformer.h.0.mlp.c_fc.weight"], weights["transformer.h.1.attn.c_attn.weight"]
    assert (up.role, up.fan_in, up.fan_out) == ("up", 16, 64)
    assert (qkv.role, qkv.fan_in, qkv.fan_out, qkv.layer) == ("qkv", 16, 48, 2)
    assert {weights[f"transformer.{name}.weight"].role for name in ("wte", "wpe")} == {"embed", "position"}
    assert sum(weight.in_block_matrix for weight in weights.values()) == 2 * 4


def test_linear_fans_match_the_module(llama):
    for name, module in llama.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = describe(f"{name}.weight", module.weight.shape)
            assert (weight.fan_in, weight.fan_out) == (module.in_features, module.out_features)


def test_a_matrix_that_tensor_parallelism_has_cut_keeps_its_full_shape(llama):
    up = llama.model.layers[0].mlp.up_proj.weight
    assert full_shape(up) == (24, 16)
    cut = torch.nn.Parameter(torch.empty(12, 16))
    cut.ds_autotp_universal_checkpoint_meta = {"logical_shape": (24, 16), "partition_dim": 0}
    assert full_shape(cut) == (24, 16)
    cut.ds_shape = (12, 16)  # and ZeRO-3 has cut the rest
    assert full_shape(cut) == (24, 16)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.gate",
        "model.layers.0.self_attn.xq_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        role_and_layer(name)
