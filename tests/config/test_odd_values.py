"""Every key of a run file with values that it was not meant for: each is refused in a sentence, or trains a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from pretrain.config.explain import sections_in
from pretrain.config.schema import Config, load_config
from pretrain.engine.build_model import build_model
from pretrain.errors import UserError
from pretrain.methods import REGISTRY
from pretrain.optim.param_groups import build_optimizer
from pretrain.trainer.plan import Plan, make_plan
from pretrain.trainer.plan_summary import describe_plan
from tests.support.corpus import Corpus, tiny

ODD = ("-1", "0", "1", "1e30", "1e-30", "1e-50", ".nan", "abc", '""', "[]", "true")
MODELS = {"llama": {}, "gpt2": {"family": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}}
ROPE = {
    "linear": {"factor": 2},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1, "truncate": False},
    "longrope": {"factor": 2, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
    "llama3": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192},
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.fixture
def run_file(corpus: Corpus, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    content = tiny(corpus) | {"methods": [], "deepspeed": {}, "out": str(tmp_path / "runs")}
    content["model"] = MODELS[getattr(request, "param", "llama")] or content["model"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key below `section`, except those of the model and of methods, by its full name."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if len(inner := sections_in(field.annotation)) == 1:
            yield from keys(inner[0], f"{prefix}{name}.")


def accepted(path: Path, settings: Iterable[str]) -> list[Config]:
    """Return the different configurations that these settings make. Any error other than a UserError fails the test."""
    found = {}
    for setting in settings:
        with suppress(UserError):
            config = load_config(path, [setting])
            found[config.to_yaml()] = config
    return list(found.values())


def plans(path: Path, settings: Iterable[str]) -> list[Plan]:
    """Return the plans of those that can be planned."""
    found = []
    for config in accepted(path, settings):
        with suppress(UserError):
            found.append(make_plan(config, world_size=1))
            describe_plan(found[-1])
    return found


def assert_trains(plan: Plan) -> None:
    """Build the model and take one step of the run's optimizer, with a finite loss."""
    torch.manual_seed(0)
    model = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, plan.model_config.vocab_size, (2, plan.config.data.seq_len + 1))
    loss = model(tokens[:, :-1], tokens[:, 1:])["total"]
    loss.backward()
    build_optimizer(model, plan.config).step()
    assert loss.isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("run_file", MODELS, indirect=True)
def test_each_field_of_a_model_is_refused_or_trains(run_file: Path) -> None:
    fields = keys(type(load_config(run_file).model))
    names = [name for name in fields if name != "family" and not name.startswith("rope_scaling.")]
    found = plans(run_file, [f"model.{name}={value}" for name in names for value in ODD])
    assert len(found) > 10
    for plan in found:
        assert_trains(plan)


@pytest.mark.slow
def test_each_other_key_is_refused_or_can_be_planned(run_file: Path) -> None:
    names = [name for name in keys(Config) if not name.startswith("model.")]
    assert len(plans(run_file, [f"{name}={value}" for name in names for value in ODD])) > 10


@pytest.mark.slow
def test_each_option_of_a_method_is_refused_or_trains(run_file: Path) -> None:
    options = [(name, option) for name, method in REGISTRY.items() for option in method.model_fields.keys() - {"name"}]
    settings = [f"methods=[{{name: {name}, {option}: {value}}}]" for name, option in options for value in ODD]
    for plan in plans(run_file, settings):
        assert_trains(plan)


def test_a_warmup_that_is_longer_than_the_run_is_said(run_file: Path) -> None:
    (plan,) = plans(run_file, ["optim.schedule.warmup_steps=80"])  # of a run of 8 steps to 5e-3
    assert "rate      NEVER REACHES optim.lr 0.005: warmup takes 80 steps, and the run ends at 0.0005" in describe_plan(
        plan
    )


@pytest.mark.parametrize("kind", ROPE)
def test_each_rope_type_with_its_keys_trains(run_file: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]}
    (plan,) = plans(run_file, [f"model.rope_parameters={rope}"])
    assert plan.model_config.rope_parameters["rope_type"] == kind
    assert_trains(plan)
