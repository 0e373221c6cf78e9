"""Models with arbitrary weights, before and after the methods' folds."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from pretrain.engine.build_model import build_model
from pretrain.engine.initialize import initial_rule
from pretrain.model.export_edits import as_lazy
from pretrain.trainer.plan import Plan


def random_model(plan: Plan) -> torch.nn.Module:
    """Return the model that trains, its weights away from their initial values: no gain is 1, nothing is symmetric."""
    model = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}})
    model.set_attn_implementation("sdpa")  # tests give it padding, which training does not have
    generator = torch.Generator().manual_seed(3)
    for weight, parameter in zip(plan.weights, model.parameters(), strict=True):
        draw, _ = initial_rule(weight, plan.config, 0.05)
        noise = torch.randn(weight.shape, generator=generator)
        parameter.data.copy_(draw.mean + noise * (draw.std or 0.1 * max(abs(draw.mean), 0.5)))
    return model


def state_of(plan: Plan, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the methods of the plan."""
    state: dict[str, torch.Tensor] = {}
    for method in plan.config.methods:
        state |= method.state(model)
    return state


def folded(plan: Plan, model: torch.nn.Module) -> torch.nn.Module:
    """Return the stock model that the methods' folds make of `model`."""
    tensors = as_lazy(
        {name: value.detach().clone() for name, value in model.named_parameters()} | state_of(plan, model)
    )
    config = plan.model_config
    for method in sorted(plan.config.methods, key=lambda method: method.fold_order):
        config = method.fold(tensors, config)
    stock = AutoModelForCausalLM.from_config(config)
    assert dict(stock.named_parameters()).keys() == tensors.keys()
    for name, parameter in stock.named_parameters():
        parameter.data.copy_(tensors[name]())
    return stock.eval()
