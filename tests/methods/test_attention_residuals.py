"""Attention Residuals: every number of blocks against the dense reference, and the refused options."""

import pytest
import torch
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.engine.build_model import build_model
from pretrain.errors import UserError
from pretrain.monitor.activations import record_activations
from pretrain.trainer.plan import make_plan
from tests.methods.references.attention_residuals import Reference
from tests.support.method_suite import Case, Run


def planned(corpus, folder, *methods):
    content = Case((), "tiny").config(corpus, folder) | {"methods": list(methods)}
    return make_plan(Config.model_validate(content), world_size=1), content


def random_model(plan):
    model = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("blocks", [None, 1, 2, 3, 4, 5, 6])
def test_any_number_of_blocks_computes_what_the_reference_does(corpus, tmp_path, blocks):
    plan, content = planned(corpus, tmp_path, {"name": "attention_residuals", "blocks": blocks})
    model = random_model(plan)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dense = Reference(Run(tmp_path, content).settings(), weights, {"blocks": blocks})
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(ids).logits, dense.logits(dense.hidden(ids)), rtol=2e-5, atol=2e-5)


def test_with_queries_of_0_a_sublayer_reads_the_average(corpus, tmp_path):
    plan, _ = planned(corpus, tmp_path, {"name": "attention_residuals"})
    read = random_model(plan).model.layers[1].attn_read
    read.query.data.zero_()
    first, second, third = torch.randn(3, 2, 5, 36).unbind()
    torch.testing.assert_close(read((third, (first, second))), (first + second + third) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_a_read_are_those_of_its_formula(corpus, tmp_path, dtype):
    plan, _ = planned(corpus, tmp_path, {"name": "attention_residuals"})
    read = random_model(plan).model.layers[1].attn_read.to(dtype)
    torch.manual_seed(2)
    sources = [torch.randn(2, 5, 36).to(dtype).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, 5, 36)
    found = torch.autograd.grad((read((sources[2], tuple(sources[:2]))) * weights).sum(), [read.query, *sources])
    v = torch.stack([source.detach().double() for source in sources]).requires_grad_()
    query = read.query.detach().double().requires_grad_()
    shares = ((v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()) @ query).softmax(0).unsqueeze(-1)
    expected = torch.autograd.grad(((shares * v).sum(0) * weights).sum(), [query, v])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.stack(found[1:]).double(), expected[1], rtol=tolerance, atol=tolerance)


def test_activations_are_recorded_after_each_block(corpus, tmp_path):
    plan, _ = planned(corpus, tmp_path, {"name": "attention_residuals", "blocks": 2})
    model = random_model(plan)
    with record_activations(model) as rows:
        model(torch.arange(20)[None])
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert len({row["top"] for row in rows}) == 3


def test_more_blocks_than_sublayers_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="blocks is 7, but the model has 6 sub-layers"):
        planned(corpus, tmp_path, {"name": "attention_residuals", "blocks": 7})


@pytest.mark.parametrize("blocks", [0, -2, 1.5])
def test_blocks_are_counted_from_1(corpus, tmp_path, blocks):
    with pytest.raises(ValidationError, match="blocks"):
        planned(corpus, tmp_path, {"name": "attention_residuals", "blocks": blocks})


def test_pre_ln_is_refused_because_its_fold_would_not_be_exact(corpus, tmp_path):
    with pytest.raises(ValidationError, match="takes the mean out of what each sub-layer writes"):
        planned(corpus, tmp_path, {"name": "pre_ln"}, {"name": "attention_residuals"})
