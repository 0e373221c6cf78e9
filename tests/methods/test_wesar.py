"""WeSaR's options: the backbone that W̄ starts as, and gates that are not trained.

The deviations are those of the paper's Table 1; the embedding's is 1 in each of its columns.
"""

from math import sqrt

import pytest
import torch
from transformers import LlamaForCausalLM

from pretrain.config.schema import Config
from pretrain.engine.build_model import build_model
from pretrain.methods import RunContext, decisions_that_clash
from pretrain.methods.embedding_scale import EmbeddingScale
from pretrain.methods.wesar import WeSaR
from pretrain.model.export_edits import as_lazy
from pretrain.model.layout import describe
from pretrain.trainer.plan import Plan, make_plan
from tests.support.corpus import tiny

LAYERS, HIDDEN, MLP = 2, 48, 96
HE = {"embed": 1.0, "q": 1 / sqrt(HIDDEN), "o": 1 / sqrt(2 * LAYERS * HIDDEN), "down": 1 / sqrt(LAYERS * MLP)}
SMALL = sqrt(2 / (5 * HIDDEN))
SMALLS = {"embed": 1.0, "q": SMALL, "o": SMALL / sqrt(2 * LAYERS), "down": SMALL / sqrt(2 * LAYERS)}


def plan_with(corpus, **options) -> Plan:
    content = tiny(corpus) | {"methods": [{"name": "wesar", **options}]}
    return make_plan(Config.model_validate(content), world_size=1)


@pytest.mark.parametrize(("backbone", "targets"), [("he", HE), ("small", SMALLS)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_product_starts_with_the_deviation_of_the_backbone(corpus, backbone, targets, frozen):
    plan = plan_with(corpus, backbone=backbone, frozen=frozen, variance=9e-6)
    (wesar,) = plan.config.methods
    scales = {weight.name: weight for weight in plan.weights if weight.role == "scale"}
    assert len(scales) == (0 if frozen else 7 * LAYERS + 2)
    for weight in plan.weights:
        if weight.role in targets:
            factor = wesar.forward_factor(weight)
            alpha = wesar.init_draw(scales[factor]).value if isinstance(factor, str) else factor
            assert wesar.init_std(weight) == pytest.approx(3e-3)
            assert alpha * 3e-3 == pytest.approx(targets[weight.role])


@pytest.mark.parametrize(("backbone", "query"), [("he", 3.494), ("small", 2.210)])
def test_gates_start_with_the_papers_numbers(backbone, query):
    """d = 2048, N = 24, σ² = 4e-5: 158.1 for the embedding with either backbone."""
    matrices = {
        "model.embed_tokens": describe("model.embed_tokens.weight", (32000, 2048)),
        "model.layers.0.self_attn.q_proj": describe("model.layers.0.self_attn.q_proj.weight", (2048, 2048)),
    }
    facts = dict.fromkeys(RunContext.__dataclass_fields__) | {"hidden_size": 2048, "layers": 24, "matrices": matrices}
    wesar = WeSaR(backbone=backbone).bound(RunContext(**facts))
    starts = [wesar.init_draw(describe(f"{module}.weight_scale", (1,))).value for module in matrices]
    assert starts == [pytest.approx(158.1, abs=0.05), pytest.approx(query, abs=5e-4)]


@pytest.mark.parametrize("backbone", ["he", "small"])
def test_its_embedding_is_a_scaled_one_already(backbone):
    (clash,) = decisions_that_clash((EmbeddingScale(), WeSaR(backbone=backbone)))
    assert "wesar has a scaled embedding already, with either backbone" in clash


def test_frozen_gates_fold_to_the_bit(corpus):
    plan = plan_with(corpus, frozen=True)
    model = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    stored = {name: value.detach().clone() for name, value in model.named_parameters()}
    tensors = as_lazy(stored)
    stock = LlamaForCausalLM(plan.config.methods[0].fold(tensors, plan.model_config)).eval()
    stock.load_state_dict({name: load() for name, load in tensors.items()})
    tokens = torch.randint(0, 100, (2, 16), generator=generator)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(stock.get_parameter(name), stored[name] * HE["down"] / sqrt(4e-5))
