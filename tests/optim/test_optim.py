"""Learning-rate schedules against their closed forms, and the weights that decay."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config.optim_section import OptimSection
from pretrain.methods.base import Method
from pretrain.model.layout import Weight, describe
from pretrain.optim.param_groups import build_optimizer, parameter_groups
from pretrain.optim.schedule import learning_rate
from pretrain.optimizers import OPTIMIZERS

TOTAL, WARMUP, PEAK, FLOOR = 100, 10, 2e-3, 0.1


def optim(name: str, **more: object) -> OptimSection:
    schedule = {"name": name, "warmup_steps": WARMUP, "min_lr_ratio": FLOOR, **more}
    return OptimSection.model_validate({"lr": PEAK, "schedule": schedule})


def rates(config: OptimSection) -> list[float]:
    """Return the learning rates of steps 1..100."""
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
    floor=st.floats(0, 1, width=32, allow_subnormal=False),  # smaller values are refused
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


def config_with(methods: Sequence[Method] = (), **optim: object) -> SimpleNamespace:
    """The part of a run's configuration that an optimizer needs."""
    clip = {"grad_clip": None} if optim.get("name") == "muon" else {}
    return SimpleNamespace(optim=OptimSection.model_validate({"lr": 0.01, **clip, **optim}), methods=methods)


def groups_of(model: torch.nn.Module, methods: Sequence[Method] = (), **optim: object) -> list[tuple[set[str], dict]]:
    """Return the names in each group, and its options."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = config_with(methods, **optim)
    found = []
    for group in parameter_groups(model, config.optim, config.methods):
        found.append(({names[id(p)] for p in group["params"]}, {k: v for k, v in group.items() if k != "params"}))
    assert sorted(name for members, _ in found for name in members) == sorted(names.values())
    return found


def vectors(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.ndim == 1}


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_adamw_has_one_group_of_matrices_that_decay_and_one_of_vectors_that_do_not(
    model: torch.nn.Module, decay: float
) -> None:
    decayed, spared = groups_of(model, weight_decay=decay)
    assert spared == (vectors(model), {"weight_decay": 0.0})
    assert decayed[1] == {"weight_decay": decay}


class Decay(Method):
    """A method that decides whether the weights of one role decay, and by how much."""

    name: str = "decay"
    role: str
    value: float | None = None
    at_all: bool | None = None

    def decays(self, weight: Weight) -> bool | None:
        return self.at_all if weight.role == self.role else None

    def weight_decay(self, weight: Weight) -> float | None:
        return self.value if weight.role == self.role else None


def test_methods_say_what_decays_and_by_how_much_and_the_last_that_says_so_wins(model: torch.nn.Module) -> None:
    methods = [
        Decay(role="norm", value=0.7),
        Decay(role="norm", value=0.5, at_all=True),
        Decay(role="norm"),
        Decay(role="embed", at_all=True),
        Decay(role="embed", value=0.7, at_all=False),
        Decay(role="bias", value=0.7),
    ]
    by_weight = {
        name: group["weight_decay"]
        for members, group in groups_of(model, methods, weight_decay=0.3)
        for name in members
    }
    assert by_weight.pop("model.embed_tokens.weight") == 0.0
    assert {by_weight.pop(name) for name in list(by_weight) if "norm" in name} == {0.5}
    assert {by_weight.pop(name) for name in list(by_weight) if name.endswith("bias")} == {0.0}
    assert set(by_weight.values()) == {0.3}


def block_matrices(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("model.layers.")}


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest(model: torch.nn.Module) -> None:
    groups = groups_of(model, name="muon", weight_decay=0.3)
    by_adam = [(members, group) for members, group in groups if not group["use_muon"]]
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert by_adam == [
        (embeddings, {"use_muon": False, "weight_decay": 0.3}),
        (vectors(model), {"use_muon": False, "weight_decay": 0.0}),
    ]
    by_muon = [members for members, group in groups if group["use_muon"]]
    assert set.union(*by_muon) == block_matrices(model)


@pytest.mark.parametrize("name", ["model.embed_projection.weight", "model.head_projection.weight"])
def test_muon_steps_the_square_matrices_around_the_blocks(name: str) -> None:
    muon = OPTIMIZERS["muon"]
    assert muon.of_weight(describe(name, (8, 8))) is muon
    assert muon.of_weight(describe("lm_head.weight", (8, 8))) is OPTIMIZERS["adamw"]


def test_muon_in_the_scale_of_adamw_steps_and_decays_each_width_by_its_own_factor(model: torch.nn.Module) -> None:
    """Per step lr * lr_scale * sqrt(max(1, rows / columns)) = muon.lr * 0.2 sqrt(max(rows, columns)), and muon.lr * decay."""
    options = {"lr": 0.01, "muon": {"lr": 0.002, "weight_decay": 0.4}}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for members, group in groups_of(model, name="muon", **options):
        for rows, columns in [shapes[name] for name in members] if group["use_muon"] else []:
            step = 0.01 * group["lr_scale"] * max(1, rows / columns) ** 0.5
            assert step == pytest.approx(0.002 * 0.2 * max(rows, columns) ** 0.5)
            assert 0.01 * group["lr_scale"] * group["weight_decay"] == pytest.approx(0.002 * 0.4)


def test_muon_in_its_own_scale_has_one_group_and_takes_what_is_not_given_from_adamw(model: torch.nn.Module) -> None:
    options = {"scale": "spectral", "momentum": 0.9, "ns_method": "standard"}
    (found,) = [g for g in groups_of(model, name="muon", weight_decay=0.3, muon=options) if g[1]["use_muon"]]
    expected = {"lr_scale": 1.0, "weight_decay": 0.3, "momentum": 0.9, "ns_method": "standard", "use_muon": True}
    assert found == (block_matrices(model), expected)


def test_a_method_decides_the_weight_decay_of_what_muon_steps_too(model: torch.nn.Module) -> None:
    groups = groups_of(model, [Decay(role="up", value=0.0)], name="muon", muon={"scale": "spectral"}, weight_decay=0.3)
    spared = [members for members, group in groups if group["use_muon"] and group["weight_decay"] == 0.0]
    assert spared == [{"model.layers.0.mlp.up_proj.weight"}]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_gets_the_runs_numbers(model: torch.nn.Module, name: str) -> None:
    config = config_with(name=name, betas=[0.8, 0.9], eps=1e-6)
    groups = [g for g in build_optimizer(model, config).param_groups if not g.get("use_muon")]
    assert {(g["lr"], g["betas"], g["eps"]) for g in groups} == {(0.01, (0.8, 0.9), 1e-6)}


def test_every_parameter_is_marked_for_deepspeed_as_stepped_by_muon_or_not(model: torch.nn.Module) -> None:
    optimizer = build_optimizer(model, config_with(name="muon"))
    assert type(optimizer).__name__ == "MuonWithAuxAdam"
    assert {name for name, p in model.named_parameters() if p.use_muon} == block_matrices(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "muon"}, "grad_clip must be null: DeepSpeed clips after Muon"),
        ({"muon": {"lr": 0.02}}, "keys of 'muon' have no effect"),
    ],
)
def test_options_that_do_not_go_with_the_optimizer_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimSection.model_validate({"lr": 0.01, **options})
