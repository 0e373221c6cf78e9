"""SeeDNorm: the weights that decay, the refused options, and that it is RMSNorm before training."""

from math import sqrt

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pretrain.config.schema import Config
from pretrain.methods import decisions_that_clash
from pretrain.methods.layernorm_scaling import LayerNormScaling
from pretrain.methods.seednorm import SeeDNormMethod
from pretrain.model.export_edits import as_lazy
from pretrain.model.layout import describe
from pretrain.model.modeling_evenkeel import SeeDNorm
from pretrain.model.norms import ScaledSeeDNorm
from pretrain.optim.param_groups import weight_decay
from pretrain.trainer.plan import make_plan
from tests.support.method_suite import Case


def configured(corpus, folder, *methods):
    content = Case((), "tiny").config(corpus, folder) | {"methods": list(methods)}
    return Config.model_validate(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_its_initial_values_it_is_rmsnorm_to_the_bit(dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 7, 24)).to(dtype)
    dynamic, stock = SeeDNorm(24, 1e-5).to(dtype), LlamaRMSNorm(24, 1e-5).to(dtype)
    assert torch.equal(dynamic(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_layernorm_scaling_both_terms_of_the_gain_are_divided_to_the_bit(dtype):
    torch.manual_seed(0)
    trained = ScaledSeeDNorm(24, 1e-5, 1 / sqrt(3)).to(dtype)
    for parameter in trained.parameters():
        parameter.data.normal_()
    tensors = as_lazy({f"model.layers.2.input_layernorm.{kind}": value for kind, value in trained.state_dict().items()})
    LayerNormScaling().fold(tensors, None)
    exported = SeeDNorm(24, 1e-5).to(dtype)
    exported.load_state_dict({name.rpartition(".")[2]: load() for name, load in tensors.items()})
    x = torch.randn(5, 7, 24).to(dtype)
    assert torch.equal(trained(x), exported(x))
    unscaled = SeeDNorm(24, 1e-5).to(dtype)
    unscaled.load_state_dict(trained.state_dict())
    torch.testing.assert_close(trained(x).float() * sqrt(3), unscaled(x).float(), rtol=2e-2, atol=2e-2)


def decays_of_the_final_norm(plan):
    kinds = ("alpha", "beta", "weight")
    optim, methods = plan.config.optim, plan.config.methods
    return {kind: weight_decay(describe(f"model.norm.{kind}", (8,)), optim.weight_decay, methods) for kind in kinds}


def test_alpha_and_beta_decay_like_matrices_and_gamma_does_not(corpus, tmp_path):
    plan = make_plan(configured(corpus, tmp_path, {"name": "seednorm"}), world_size=1)
    assert decays_of_the_final_norm(plan) == {"alpha": 0.1, "beta": 0.1, "weight": 0.0}


@pytest.mark.parametrize("order", [1, -1])
def test_independent_weight_decay_acts_on_alpha_and_beta_too(corpus, tmp_path, order):
    both = [{"name": "seednorm"}, {"name": "independent_weight_decay", "coefficient": 3e-4}]
    plan = make_plan(configured(corpus, tmp_path, *both[::order]), world_size=1)
    expected = pytest.approx(3e-4 / plan.config.optim.lr)
    assert decays_of_the_final_norm(plan) == {"alpha": expected, "beta": expected, "weight": 0.0}
    (method,) = (method for method in plan.config.methods if method.name == "independent_weight_decay")
    with_a_rule = {weight.role for weight in plan.weights if method.training_rule(weight)}
    assert {"alpha", "beta", "up"} <= with_a_rule
    assert "norm" not in with_a_rule


def test_every_norm_of_the_stream_becomes_one_and_those_of_heads_do_not(corpus, tmp_path):
    plan = make_plan(configured(corpus, tmp_path, {"name": "qk_norm"}, {"name": "seednorm"}), world_size=1)
    with_beta = {weight.name.rpartition(".")[0] for weight in plan.weights if weight.role == "beta"}
    blocks = {f"model.layers.{i}.{norm}" for i in range(3) for norm in ("input_layernorm", "post_attention_layernorm")}
    assert with_beta == blocks | {"model.norm"}


@pytest.mark.parametrize("start", [0, -1.0])
def test_alpha_must_start_above_0(corpus, tmp_path, start):
    with pytest.raises(ValidationError, match="alpha_init"):
        configured(corpus, tmp_path, {"name": "seednorm", "alpha_init": start})


@pytest.mark.parametrize("other", ["pre_ln", "osp"])
def test_another_kind_of_norm_is_refused(corpus, tmp_path, other):
    with pytest.raises(ValidationError, match="both decide the kind of normalization"):
        configured(corpus, tmp_path, {"name": "seednorm"}, {"name": other})


def test_options_of_a_llama_survive():
    given = LlamaConfig(
        hidden_size=48, num_attention_heads=4, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    made = SeeDNormMethod().configure(given)
    kept = {key: value for key, value in given.to_dict().items() if key not in ("model_type", "architectures")}
    assert {key: made.to_dict()[key] for key in kept} == kept


def test_it_may_be_listed_alone():
    assert decisions_that_clash((SeeDNormMethod(),)) == []
