"""The model that is built, its initial rules, the audit, and the hooks of a method, without ranks."""

from math import sqrt
from typing import Literal

import pytest
import torch
from transformers import LlamaForCausalLM

from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, build_model, hf_config, outline
from pretrain.engine.initialize import _audit, initial_rule, initialize_weights
from pretrain.errors import UserError
from pretrain.methods.base import Method
from pretrain.methods.lir import LIR
from pretrain.model.layout import Weight, describe
from pretrain.sharded import Moments
from pretrain.sharded.draws import Constant, GeneralizedGaussian, Normal, Uniform
from pretrain.trainer.weight_table import describe_weights
from tests.support.tiny_engines import TinyTokenizer

MODEL = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class WiderNorm(Method):
    """A method that uses the hooks before sharding."""

    name: Literal["wider_norm"] = "wider_norm"

    def configure(self, hf_config):
        hf_config.rms_norm_eps = 0.25
        return hf_config

    def transform(self, model):
        for block in model.model.layers:
            block.mlp.up_proj = torch.nn.Linear(32, 48, bias=True)


def config(**changes) -> Config:
    return Config.model_validate(
        {
            "name": "case",
            "model": MODEL,
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": 16, "global_batch_size": 1, "micro_batch_size": 1},
            "steps": 1,
            "optim": {"lr": 1e-3},
            "deepspeed": {"zero_optimization": {"stage": 0}},
            **changes,
        }
    )


def test_the_models_fields_come_from_the_run_file_and_the_tokenizer():
    found = hf_config(config(), TinyTokenizer(100))
    assert (found.hidden_size, found.vocab_size, found.max_position_embeddings) == (32, 100, 16)
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 99}, "vocab_size 99 is smaller than the 100 tokens"),
        ({"max_position_embeddings": 8}, "smaller than data.seq_len 16"),
        ({"pad_token_id": 100}, "model.pad_token_id 100 is outside of the vocabulary, whose ids are 0 to 99"),
        ({"eos_token_id": [2, 700]}, "model.eos_token_id 700 is outside"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        hf_config(config(model={**MODEL, **fields}), TinyTokenizer(100))


def test_methods_change_the_configuration_and_the_modules_before_sharding():
    run = config().model_copy(update={"methods": (WiderNorm(),)})
    model_config = hf_config(run, TinyTokenizer(100))
    model = build_model(run, model_config, {"zero_optimization": {"stage": 0}})
    assert model.model.norm.variance_epsilon == 0.25
    assert model.model.layers[1].mlp.up_proj.bias.shape == (48,)
    names = {weight.name for weight in outline(run, model_config)}
    assert names == {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mlp.up_proj.bias" in names


def test_the_training_model_is_the_stock_model_but_for_its_loss():
    run = config()
    ours = build_model(run, hf_config(run, TinyTokenizer(100)), {"zero_optimization": {"stage": 0}})
    torch.manual_seed(0)
    stock = LlamaForCausalLM(ours.config)
    ours.load_state_dict(stock.state_dict())
    tokens = torch.randint(0, 100, (2, 17))
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)
    expected = torch.nn.functional.cross_entropy(stock(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(ours(tokens[:, :-1], tokens[:, 1:])["total"], expected)


def test_tied_embeddings_stay_tied():
    run = config(model={**MODEL, "tie_word_embeddings": True})
    model = build_model(run, hf_config(run, TinyTokenizer(100)), {"zero_optimization": {"stage": 0}})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_norms_are_one_biases_zero_and_a_method_decides_the_deviation_of_the_rest():
    norm = describe("model.layers.0.input_layernorm.weight", (32,))
    bias = describe("model.layers.0.mlp.up_proj.bias", (48,))
    up = describe("model.layers.0.mlp.up_proj.weight", (48, 32))
    with_lir = config(methods=[{"name": "lir"}], init={"distribution": "uniform"})
    assert initial_rule(norm, with_lir, 0.02)[0] == Constant(1.0)
    assert initial_rule(bias, with_lir, 0.02)[0] == Constant(0.0)
    assert initial_rule(up, config(), 0.02)[0] == Normal(0.02)
    several = with_lir.model_copy(update={"methods": (LIR(initializer_range=0.5), WiderNorm())})
    assert initial_rule(up, several, 0.02)[0] == Uniform(0.5)


class InMemory:
    """A stand-in for `ShardedWeights` with whole weights in one process."""

    def __init__(self, weights: list[Weight]) -> None:
        self.layout = {weight.name: weight for weight in weights}
        self.values = {weight.name: torch.empty(weight.numel) for weight in weights}

    def fill_(self, seed, rule):
        for name, values in self.values.items():
            rule(self.layout[name]).fill_(values, seed=seed, name=name, start=0)

    def moments(self):
        return {name: Moments.of(values) for name, values in self.values.items()}


def test_a_run_starts_from_the_distribution_and_the_seed_that_it_names():
    run = config(seed=3, init={"distribution": "uniform"}, methods=[{"name": "lir", "initializer_range": 0.5}])
    weights = InMemory(outline(run, hf_config(run, TinyTokenizer(100))))
    measured = initialize_weights(weights, run, 0.02)
    second = "model.layers.1.mlp.up_proj.weight"
    expected = torch.empty(48 * 32)
    Uniform(0.5 / sqrt(2)).fill_(expected, seed=3, name=second, start=0)
    assert torch.equal(weights.values[second], expected)
    assert (weights.values["model.norm.weight"] == 1).all()
    assert measured[second].std == pytest.approx(expected.double().std().item())


@pytest.mark.parametrize(
    "measured",
    [
        Moments(1536, 0.0, 1535 * 0.03**2),
        Moments(1536, 0.01, 1535 * 0.02**2),
        Moments(1535, 0.0, 1534 * 0.02**2),
        Moments(1536, float("nan"), float("nan")),
    ],
    ids=["wrong deviation", "wrong mean", "a missing element", "not a number"],
)
def test_the_audit_stops_a_weight_that_is_not_as_its_rule_says(measured):
    up = describe("model.layers.0.mlp.up_proj.weight", (48, 32))
    _audit(up, Moments(1536, 0.0001, 1535 * 0.0201**2), Normal(0.02))
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj"):
        _audit(up, measured, Normal(0.02))


def test_the_audit_expects_more_spread_of_heavier_tails():
    """Seven standard errors of a normal weight's deviation are 4.4 of Laplace's, and 11 of a uniform one's."""
    up = describe("model.layers.0.mlp.up_proj.weight", (48, 32))
    measured = Moments(1536, 0.0, 1535 * (0.02 * (1 + 7 / sqrt(2 * 1536))) ** 2)
    _audit(up, measured, GeneralizedGaussian(0.02, 1.0))
    for draw in (Normal(0.02), Uniform(0.02)):
        with pytest.raises(RuntimeError, match="went wrong"):
            _audit(up, measured, draw)


def test_the_table_accounts_for_every_weight():
    run = config(methods=[{"name": "lir"}, {"name": "tvr", "roles": ["up"]}])
    model_config = hf_config(run, TinyTokenizer(100))
    run = bind_methods(run, model_config)
    weights = outline(run, model_config)
    table = describe_weights(weights, run, 0.02)
    rows = [line.split() for line in table.splitlines()[2:]]
    assert sum(int(row[2]) for row in rows) == len(weights)
    during = {row[0]: "tvr:" in row for row in rows}
    assert [role for role, rescaled in during.items() if rescaled] == ["up"]


def test_the_table_says_which_distribution_each_weight_has():
    run = config(methods=[{"name": "lir"}], init={"distribution": "truncated_normal", "bound": 2})
    table = describe_weights(outline(run, hf_config(run, TinyTokenizer(100))), run, 0.02)
    rows = {line.split()[0]: line for line in table.splitlines()[2:]}
    assert "normal cut at 2 deviations, lir: 0.02 / sqrt(l)" in rows["up"]
    assert "constant 1" in rows["norm"]
