"""The methods that choose initial deviations, weight by weight, and the methods that they can be combined with."""

from __future__ import annotations

from math import gamma, sqrt

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, hf_config, model_class, outline
from pretrain.engine.initialize import initial_rule
from pretrain.errors import UserError
from pretrain.methods.embedding_scale import EmbeddingScale
from pretrain.model.layout import describe, describe_model
from pretrain.sharded.draws import Constant, Draw, GeneralizedGaussian, Normal, TruncatedNormal, Uniform
from pretrain.trainer.plan import make_plan
from tests.support.method_suite import Case
from tests.support.tiny_engines import TinyTokenizer

DECIDING = ("lir", "residual_init", "small_init", "he_init", "xavier_init", "depth_scaled_init")
LLAMA = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"family": "gpt2", "n_embd": 32, "n_layer": 8, "n_head": 4}


def config(*methods: dict, model: dict = LLAMA, **changes) -> Config:
    return Config.model_validate(
        {
            "name": "case",
            "model": model,
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": 16, "global_batch_size": 1, "micro_batch_size": 1},
            "steps": 1,
            "optim": {"lr": 1e-3},
            "methods": methods,
            "deepspeed": {"zero_optimization": {"stage": 0}},
            **changes,
        }
    )


def draws(run: Config) -> dict[str, Draw]:
    """Return the distribution of every weight, by name."""
    model_config = hf_config(run, TinyTokenizer(96))
    bound = bind_methods(run, model_config)
    return {weight.name: initial_rule(weight, bound, 0.02)[0] for weight in outline(bound, model_config)}


def block(layer: int, module: str) -> str:
    return f"model.layers.{layer - 1}.{module}.weight"


def test_residual_init_divides_what_writes_to_the_stream_by_the_root_of_all_branches():
    found = draws(config({"name": "residual_init", "std": 0.04}))
    for layer in (1, 8):
        assert found[block(layer, "self_attn.o_proj")].std == pytest.approx(0.01)
        assert found[block(layer, "mlp.down_proj")].std == pytest.approx(0.01)
        assert found[block(layer, "mlp.up_proj")].std == 0.04
    assert found["model.embed_tokens.weight"].std == found["lm_head.weight"].std == 0.04


def test_depth_scaled_init_divides_it_by_the_root_of_the_branches_so_far():
    found = draws(config({"name": "depth_scaled_init"}))
    expected = {1: 0.02 / sqrt(2), 2: 0.01, 8: 0.005}
    for layer, std in expected.items():
        assert found[block(layer, "self_attn.o_proj")].std == pytest.approx(std)
        assert found[block(layer, "mlp.down_proj")].std == pytest.approx(std)
        assert found[block(layer, "self_attn.q_proj")].std == 0.02


def test_gpt2s_outputs_are_its_two_projections():
    for name in ("residual_init", "depth_scaled_init"):
        found = draws(config({"name": name}, model=GPT2))
        outputs = {weight for weight, draw in found.items() if 0 < draw.std < 0.02}
        assert outputs == {f"transformer.h.{i}.{m}.c_proj.weight" for i in range(8) for m in ("attn", "mlp")}


def test_xavier_counts_each_matrixs_own_fans():
    found = draws(config({"name": "xavier_init"}))
    assert found[block(1, "self_attn.q_proj")].std == pytest.approx(sqrt(2 / 64))
    assert found[block(1, "self_attn.k_proj")].std == pytest.approx(sqrt(2 / 48))  # two of four heads
    assert found[block(1, "mlp.down_proj")].std == pytest.approx(sqrt(2 / 80))
    assert found["model.embed_tokens.weight"].std == found["lm_head.weight"].std == pytest.approx(sqrt(2 / 128))


def test_xavier_counts_a_fused_matrix_as_three():
    found = draws(config({"name": "xavier_init"}, model=GPT2))
    assert found["transformer.h.0.attn.c_attn.weight"].std == pytest.approx(sqrt(2 / 64))
    assert found["transformer.h.0.mlp.c_fc.weight"].std == pytest.approx(sqrt(2 / 160))
    assert found["transformer.wpe.weight"].std == pytest.approx(sqrt(2 / 48))


def glorot(inputs: int, outputs: int) -> float:
    """Return the standard deviation that torch's own `xavier_normal_` gives an nn.Linear."""
    torch.manual_seed(0)
    return float(torch.nn.init.xavier_normal_(torch.empty(outputs, inputs)).std())


@pytest.mark.parametrize("model", [{**LLAMA, "num_key_value_heads": 4}, GPT2], ids=["llama", "gpt2"])
def test_xavier_starts_as_the_code_of_output_embedding_centering(model):
    """One matrix of 3d outputs for q, k, v, an embedding of 1/√d, and 0.02/√(2N) for the attention's output alone."""
    options = {"fused_qkv": True, "unit_embedding": True, "attention_output_std": 0.02}
    found = draws(config({"name": "xavier_init", **options}, model=model))
    if model is GPT2:
        assert found["transformer.h.0.attn.c_attn.weight"].std == pytest.approx(glorot(32, 96), rel=0.05)
        assert found["transformer.h.0.attn.c_proj.weight"].std == pytest.approx(0.005)
        return
    for role in "qkv":
        assert found[block(3, f"self_attn.{role}_proj")].std == pytest.approx(glorot(32, 96), rel=0.05)
        assert found[block(3, f"self_attn.{role}_proj")].std == pytest.approx(sqrt(1 / 64))
    assert found[block(8, "self_attn.o_proj")].std == pytest.approx(0.02 / sqrt(16))
    assert found[block(8, "mlp.down_proj")].std == pytest.approx(glorot(48, 32), rel=0.05)
    assert found["model.embed_tokens.weight"].std == pytest.approx(1 / sqrt(32))
    assert found["lm_head.weight"].std == pytest.approx(glorot(32, 96), rel=0.05)


@pytest.mark.parametrize(("fan", "embedding", "up"), [("out", 96, 48), ("in", 32, 32)])
def test_gg_init_has_the_variance_of_its_fan_whatever_its_shape(fan, embedding, up):
    for shape in (0.7, 2.0):
        found = draws(config({"name": "gg_init", "shape": shape, "fan": fan}))
        assert found["model.embed_tokens.weight"] == GeneralizedGaussian(pytest.approx(sqrt(2 / embedding)), shape)
        assert found[block(3, "mlp.up_proj")].std == pytest.approx(sqrt(2 / up))
        assert found["model.norm.weight"] == Constant(1.0)


def test_gg_inits_scale_is_the_published_one():
    up = draws(config({"name": "gg_init", "shape": 1.3, "gain": 1.0}))[block(1, "mlp.up_proj")]
    assert up.scale == pytest.approx(sqrt(1 / 48 * gamma(1 / 1.3) / gamma(3 / 1.3)))


def test_gg_init_takes_outputs_for_the_fan_where_gpt2_stores_them_last():
    found = draws(config({"name": "gg_init"}, model=GPT2))
    assert found["transformer.h.0.mlp.c_fc.weight"].std == pytest.approx(sqrt(2 / 128))
    assert found["transformer.h.0.attn.c_attn.weight"].std == pytest.approx(sqrt(2 / 32))


@pytest.mark.parametrize("name", DECIDING)
def test_a_truncated_variant_has_the_same_deviations(name):
    plain = draws(config({"name": name}))
    cut = draws(config({"name": name}, init={"distribution": "truncated_normal", "bound": 2}))
    for weight, draw in plain.items():
        assert cut[weight] == (TruncatedNormal(draw.std, 2) if isinstance(draw, Normal) else draw)


def test_gg_init_is_a_distribution_itself():
    with pytest.raises(ValidationError, match="gg_init draws from a distribution of its own, and so does 'init'"):
        config({"name": "gg_init"}, init={"distribution": "truncated_normal"})


def test_two_methods_that_choose_deviations_are_refused():
    with pytest.raises(
        ValidationError, match="residual_init and gg_init cannot be combined: both decide the initial dev"
    ):
        config({"name": "residual_init"}, {"name": "gg_init"})


def checked(run: Config) -> None:
    model_config = hf_config(run, TinyTokenizer(96))
    bound = bind_methods(run, model_config)
    for method in bound.methods:
        method.check(outline(bound, model_config))


def test_an_embedding_at_unit_scale_is_not_scaled_again():
    scaling = {"name": "embedding_scale"}
    with pytest.raises(UserError, match="drawn with deviation 1: it is at unit scale already"):
        checked(config(scaling, {"name": "he_init"}))
    checked(config(scaling, {"name": "small_init"}))
    checked(config({**scaling, "multiplier": 2.0}, {"name": "he_init"}))
    with pytest.raises(UserError, match=r"with inverse_std, .* at unit scale already"):
        checked(config({**scaling, "rule": "inverse_std"}, {"name": "he_init"}))
    checked(config({**scaling, "rule": "inverse_std"}, {"name": "small_init"}))


def scaled(*methods: dict, **options) -> EmbeddingScale:
    """Return the bound method `embedding_scale` with these options, beside other methods."""
    run = config({"name": "embedding_scale", **options}, *methods)
    return bind_methods(run, hf_config(run, TinyTokenizer(96))).methods[0]


def test_the_scaled_embedding_says_its_factor():
    model_config = hf_config(config(), TinyTokenizer(96))
    layout = describe_model(model_class(model_config)(model_config))
    factors = {weight.name: scaled().forward_factor(weight) for weight in layout}
    assert factors.pop("model.embed_tokens.weight") == pytest.approx(sqrt(32))
    assert set(factors.values()) == {None}


def test_the_inverse_deviation_brings_the_stream_to_unit_scale():
    """arXiv 2410.05052: 1/σ, which is √(5d/2) with Small initialization."""
    embedding = describe("model.embed_tokens.weight", (96, 32))
    small, lir = {"name": "small_init"}, {"name": "lir", "initializer_range": 0.05}
    for methods, factor in (([small], sqrt(5 * 32 / 2)), ([lir], 20), ([], 50)):
        assert scaled(*methods, rule="inverse_std").forward_factor(embedding) == pytest.approx(factor)


def test_a_resumed_run_has_the_factor_that_it_started_with():
    """The identity of forward in a checkpoint differs for two factors, and not for initial values without an effect there."""
    lir, narrower = ({"name": "lir", "initializer_range": std} for std in (0.02, 0.01))
    assert scaled(lir).forward_identity() == scaled(narrower).forward_identity() == "embedding_scale {}"
    identities = {scaled(*m, rule="inverse_std").forward_identity() for m in ([lir], [narrower], [])}
    assert len(identities) == 2  # without lir it is 0.02, too


def test_a_multiplier_and_a_rule_contradict_each_other():
    with pytest.raises(ValidationError, match="give either multiplier or rule: inverse_std, not both"):
        config({"name": "embedding_scale", "rule": "inverse_std", "multiplier": 3.0})


def test_deviations_by_role_are_those_of_the_run_file_and_others_are_the_models():
    found = draws(config(init={"std": {"embed": 1.0, "o": 0.003, "down": 0.0, "head": 0.5}}))
    assert found["model.embed_tokens.weight"].std == 1.0
    assert found["lm_head.weight"].std == 0.5
    for layer in (1, 8):
        assert found[block(layer, "self_attn.o_proj")].std == 0.003
        assert found[block(layer, "mlp.down_proj")].std == 0.0
        assert found[block(layer, "self_attn.q_proj")].std == 0.02  # model.initializer_range
        assert found[block(layer, "input_layernorm")].mean == 1.0


def test_a_table_of_a_paper_can_be_written_down():
    """WeSaR's Small initialization, whose embedding has deviation 1, by hand and by the method."""
    small, output = sqrt(2 / (5 * 32)), sqrt(2 / (5 * 32)) / sqrt(2 * 8)
    table = dict.fromkeys(("q", "k", "v", "gate", "up", "head"), small) | {"o": output, "down": output, "embed": 1.0}
    by_hand, by_method = draws(config(init={"std": table})), draws(config({"name": "small_init"}))
    assert by_hand.pop("model.embed_tokens.weight").std == 1.0
    del by_method["model.embed_tokens.weight"]
    assert {name: draw.std for name, draw in by_hand.items()} == pytest.approx(
        {name: draw.std for name, draw in by_method.items()}
    )
    fused = draws(config(model=GPT2, init={"std": {"qkv": sqrt(1 / (2 * 32)), "embed": 1 / sqrt(32)}}))
    expected = draws(config({"name": "xavier_init", "fused_qkv": True, "unit_embedding": True}, model=GPT2))
    for name in ("transformer.wte.weight", "transformer.h.3.attn.c_attn.weight"):
        assert fused[name].std == pytest.approx(expected[name].std)


def test_deviations_by_role_go_with_every_distribution():
    kinds = {"truncated_normal": TruncatedNormal, "uniform": Uniform, "generalized_gaussian": GeneralizedGaussian}
    for kind, draw in kinds.items():
        found = draws(config(init={"distribution": kind, "std": {"embed": 0.25}}))["model.embed_tokens.weight"]
        assert isinstance(found, draw)
        assert found.std == 0.25


@pytest.mark.parametrize("name", ["lir", "gg_init", "wesar", "xavier_init"])
def test_a_method_that_decides_the_deviations_leaves_none_to_the_run_file(name):
    with pytest.raises(ValueError, match=f"{name} decides the initial deviations, and so does 'init.std'"):
        config({"name": name}, init={"std": {"embed": 1.0}})


def test_a_role_that_the_model_does_not_have_is_refused(corpus, tmp_path):
    content = Case((), "roles").config(corpus, tmp_path)
    for role, tied, expected in (("qkv", False, "matrices are embed, q, k, v, o, gate"), ("head", True, "embedding's")):
        model = {**content["model"], "tie_word_embeddings": tied}
        with pytest.raises(UserError, match=f"init.std.{role} matches no weight.*{expected}"):
            make_plan(Config.model_validate({**content, "model": model, "init": {"std": {role: 0.1}}}), world_size=1)
