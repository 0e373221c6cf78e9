"""Independent weight decay: the options of the optimizer's groups, for AdamW and for Muon."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, build_model, hf_config
from pretrain.optim.param_groups import parameter_groups
from tests.support.tiny_engines import TinyTokenizer

MODEL = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "attention_bias": True,
}


def decays(**optim) -> dict[str, float]:
    """Return the share of each weight that one step at the peak takes away."""
    run = Config.model_validate(
        {
            "name": "case",
            "model": MODEL,
            "tokenizer": "none",
            "data": {"train": "none", "seq_len": 16, "global_batch_size": 1, "micro_batch_size": 1},
            "steps": 1,
            "optim": {"grad_clip": None, **optim},
            "methods": [{"name": "independent_weight_decay", "coefficient": 3e-4}],
            "deepspeed": {"zero_optimization": {"stage": 0}},
        }
    )
    model_config = hf_config(run, TinyTokenizer(96))
    run = bind_methods(run, model_config)
    with torch.device("meta"):
        model = build_model(run, model_config, {"zero_optimization": {"stage": 0}})
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group["weight_decay"] * run.optim.lr * group.get("lr_scale", 1.0)
        for group in parameter_groups(model, run.optim, run.methods)
        for parameter in group["params"]
    }


@pytest.mark.parametrize("lr", [1e-4, 3e-2])
@pytest.mark.parametrize("muon", [{}, {"name": "muon"}, {"name": "muon", "muon": {"lr": 7e-3, "weight_decay": 0.5}}])
def test_one_step_at_the_peak_takes_the_coefficient_whatever_the_learning_rate(lr, muon):
    found = decays(lr=lr, **muon)
    vectors = {name for name in found if name.endswith(("norm.weight", "layernorm.weight", "bias"))}
    assert len(vectors) == 3 + 4
    for name, share in found.items():
        assert share == pytest.approx(0.0 if name in vectors else 3e-4, rel=1e-9), name
