"""Learning-rate schedules against their closed forms, and what weight decay acts on."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import OptimSection
from pretrain.optim import build_optimizer, learning_rate, parameter_groups

TOTAL, WARMUP, PEAK, FLOOR = 100, 10, 2e-3, 0.1


def optim(name: str, **more: object) -> OptimSection:
    schedule = {"name": name, "warmup_steps": WARMUP, "min_lr_ratio": FLOOR, **more}
    return OptimSection.model_validate({"lr": PEAK, "schedule": schedule})


def rates(config: OptimSection) -> list[float]:
    """The learning rate of steps 1..100."""
    return [learning_rate(config, step, TOTAL) for step in range(1, TOTAL + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_from_the_first_step_to_the_peak(name: str) -> None:
    assert rates(optim(name))[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])


def test_cosine_follows_half_a_cosine_from_the_peak_to_the_floor() -> None:
    def closed(step: int) -> float:
        return PEAK * (FLOOR + (1 - FLOOR) * (1 + cos(pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2)

    found = rates(optim("cosine"))
    assert found[WARMUP:] == pytest.approx([closed(step) for step in range(WARMUP + 1, TOTAL + 1)])
    assert found[54] == pytest.approx(PEAK * (1 + FLOOR) / 2)
    assert found[-1] == pytest.approx(PEAK * FLOOR)


def test_linear_falls_evenly_to_the_floor() -> None:
    found = rates(optim("linear"))
    falls = [before - after for before, after in zip(found[WARMUP - 1 :], found[WARMUP:], strict=False)]
    assert falls == pytest.approx([PEAK * (1 - FLOOR) / (TOTAL - WARMUP)] * (TOTAL - WARMUP))
    assert found[-1] == pytest.approx(PEAK * FLOOR)


def test_wsd_stays_at_the_peak_and_falls_linearly_over_the_last_share() -> None:
    found = rates(optim("wsd", decay_ratio=0.2, min_lr_ratio=0.0))
    assert found[WARMUP - 1 : 80] == pytest.approx([PEAK] * 71)
    assert found[80:] == pytest.approx([PEAK * (100 - step) / 20 for step in range(81, 101)])
    assert found[-1] == 0.0


def test_constant_stays_at_the_peak() -> None:
    assert rates(optim("constant"))[WARMUP:] == [PEAK] * (TOTAL - WARMUP)


@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    floor=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_no_schedule_leaves_the_range_up_to_the_peak(
    name: str, total: int, warmup: int, floor: float, decay: float
) -> None:
    config = optim(name, warmup_steps=warmup, min_lr_ratio=floor, decay_ratio=decay)
    found = [learning_rate(config, step, total) for step in range(1, total + 1)]
    assert all(0.0 <= rate <= PEAK * (1 + 1e-12) for rate in found)
    assert all(rate >= PEAK * floor * (1 - 1e-12) for rate in found[warmup:])
    assert all(
        after <= before * (1 + 1e-12) for before, after in zip(found[warmup:], found[warmup + 1 :], strict=False)
    )


@pytest.fixture
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_bias=True, **sizes))


def test_weight_decay_acts_on_matrices_only(model: torch.nn.Module) -> None:
    decayed, spared = parameter_groups(model, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert {names[id(p)] for p in spared["params"]} == {n for n in names.values() if "norm" in n or n.endswith("bias")}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_optimizer_gets_the_runs_numbers(model: torch.nn.Module) -> None:
    config = OptimSection.model_validate({"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6})
    assert {(g["lr"], g["betas"], g["eps"]) for g in build_optimizer(model, config).param_groups} == {
        (0.01, (0.8, 0.9), 1e-6)
    }
