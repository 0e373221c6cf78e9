"""Decisions and refusals of layernorm_scaling, osp and pre_ln. test_registry.py and others train and fold them."""

from math import sqrt

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.engine.build_model import build_model
from pretrain.errors import UserError
from pretrain.methods import decisions_that_clash
from pretrain.methods.embedding_scale import EmbeddingScale
from pretrain.methods.layernorm_scaling import LayerNormScaling
from pretrain.methods.osp import OSP
from pretrain.methods.pre_ln import PreLN
from pretrain.methods.qk_norm import QKNorm
from pretrain.methods.small_init import SmallInit
from pretrain.model.norms import Norm, NormKind
from pretrain.trainer.plan import Plan, make_plan
from tests.support.folded_models import folded, random_model
from tests.support.method_suite import Case, assert_same_logits


def plan_of(corpus, tmp_path, *methods, **model) -> Plan:
    """Return a run with methods that are given as a name or as all their options."""
    content = Case((), "plan").config(corpus, tmp_path)
    content["methods"] = [{"name": method} if isinstance(method, str) else method for method in methods]
    content["model"] |= model
    return make_plan(Config.model_validate(content), world_size=1)


def built(plan: Plan) -> torch.nn.Module:
    return build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}})


def kinds(plan: Plan) -> dict[str, NormKind]:
    return {name: module.kind for name, module in built(plan).named_modules() if isinstance(module, Norm)}


def test_layernorm_scaling_counts_blocks_from_1_and_spares_the_final_norm(corpus, tmp_path):
    found = kinds(plan_of(corpus, tmp_path, "layernorm_scaling", "qk_norm"))
    expected = {
        f"model.layers.{layer}.{norm}": 1 / sqrt(layer + 1)
        for layer in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert {name: kind.factor for name, kind in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("second", ["osp", "pre_ln"])
def test_layernorm_scaling_goes_with_other_norms_in_either_order(corpus, tmp_path, second):
    first = kinds(plan_of(corpus, tmp_path, "layernorm_scaling", second))
    assert first == kinds(plan_of(corpus, tmp_path, second, "layernorm_scaling"))
    assert first["model.layers.2.input_layernorm"].factor == pytest.approx(1 / sqrt(3))
    assert first["model.norm"].factor == 1.0


def test_layernorm_scaling_refuses_what_damps_the_branches_already():
    (sentence,) = decisions_that_clash((SmallInit(), LayerNormScaling()))
    assert "small_init already makes the residual branches start smaller" in sentence


def test_osp_decides_only_what_it_does():
    scale = EmbeddingScale()
    assert decisions_that_clash((OSP(embedding_projection=False), scale)) == []
    assert decisions_that_clash((OSP(single_scale_norm=False), PreLN())) == []
    assert "what happens to the embedding" in decisions_that_clash((OSP(), scale))[0]
    assert "the kind of normalization" in decisions_that_clash((OSP(), PreLN()))[0]
    assert decisions_that_clash((OSP(), QKNorm())) == []


def test_osp_with_both_parts_off_is_refused(corpus, tmp_path):
    with pytest.raises(ValidationError, match="both of its parts are off"):
        plan_of(corpus, tmp_path, {"name": "osp", "single_scale_norm": False, "embedding_projection": False})


def test_the_projections_of_osp_need_untied_embeddings(corpus, tmp_path):
    with pytest.raises(UserError, match="an embedding and a head of their own"):
        plan_of(corpus, tmp_path, "osp", tie_word_embeddings=True)
    plan_of(corpus, tmp_path, {"name": "osp", "embedding_projection": False}, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "methods",
    [
        [{"name": "osp", "embedding_projection": False}],
        [{"name": "osp", "single_scale_norm": False}],
        [{"name": "osp", "single_scale_norm": False}, "pre_ln"],
        ["osp", "layernorm_scaling", "qk_norm"],
    ],
    ids=["norms", "projections", "projections of LayerNorm", "with others"],
)
def test_parts_of_osp_fold(corpus, tmp_path, methods):
    plan = plan_of(corpus, tmp_path, *methods)
    model = random_model(plan).eval()
    assert_same_logits(folded(plan, model), model, plan.model_config.vocab_size, bit_equal=False)


def test_pre_ln_takes_the_mean_out_of_biases_too(corpus, tmp_path):
    plan = plan_of(corpus, tmp_path, "pre_ln", attention_bias=True, mlp_bias=True)
    model = random_model(plan).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(1.0)
    assert_same_logits(folded(plan, model), model, plan.model_config.vocab_size, bit_equal=False)


def test_a_tied_pre_ln_model_keeps_its_head(corpus, tmp_path):
    plan = plan_of(corpus, tmp_path, "pre_ln", tie_word_embeddings=True)
    model = random_model(plan).eval()
    embedding = model.get_parameter("model.embed_tokens.weight").detach().clone()
    stock = folded(plan, model)
    assert torch.equal(stock.lm_head.weight, embedding)
    assert not torch.allclose(stock.model.embed_tokens.weight, embedding)


def test_qk_norm_says_which_matrices_it_takes_the_scale_from(corpus, tmp_path):
    """A rescale of these, by tvr for example, has no effect in forward, and the table shows it."""
    plan = plan_of(corpus, tmp_path, "qk_norm", "tvr")
    roles = {weight.role for weight in plan.weights if "outputs normalized" in (QKNorm().training_rule(weight) or "")}
    assert roles == {"q", "k"}
