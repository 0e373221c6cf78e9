"""Messages about keys that differ at resume, with values calculated by hand from the schedule's formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.trainer.resume_changes import changes, check_length, environment_changes

TRAINED = {
    "name": "t",
    "model": {"family": "llama", "hidden_size": 64},
    "tokenizer": "tok",
    "data": {"train": "a", "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 2},
    "steps": 6,
    "optim": {"lr": 1e-3, "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1}},
    "methods": [{"name": "lir", "initializer_range": 0.02}, {"name": "mu_loss"}],
    "deepspeed": {"zero_optimization": {"stage": 3}},
}


def config(**keys: object) -> Config:
    """Return TRAINED with keys replaced. a__b stands for a.b."""
    content = json.loads(json.dumps(TRAINED))
    for key, value in keys.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    return Config.model_validate(content)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run/checkpoints/step_00000006"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config().to_yaml())
    return folder


def said(checkpoint: Path, step: int, /, **keys: object) -> list[str]:
    return [change.with_effect for change in changes(checkpoint, config(**keys), step)]


# name: (steps done, keys, what is said)
CASES = {
    # (7 - 2) / (12 - 2) of the way: 0.5 (1 + cos(pi / 2)) = 0.5 of the way from 0.1 to 1
    "longer": (
        6,
        {"steps": 12},
        "steps: 6 -> 12: the learning rate of step 7 is 5.50e-04; the old schedule ended with 1.00e-04 at step 6",
    ),
    # step 4: 0.1 + 0.9 * 0.5 (1 + cos(pi / 2)) before; of 2e-3 it is twice that
    "rate": (
        3,
        {"optim__lr": 2e-3},
        "optim.lr: 0.001 -> 0.002: the learning rate of step 4 is 1.10e-03, by the old schedule 5.50e-04",
    ),
    "linear": (
        3,
        {"optim__schedule__name": "constant"},
        "optim.schedule.name: cosine -> constant: the learning rate of step 4 is 1.00e-03, by the old schedule 5.50e-04",
    ),
    "floor": (
        5,
        {"optim__schedule__min_lr_ratio": 0.5},
        "optim.schedule.min_lr_ratio: 0.1 -> 0.5: the learning rate of step 6 is 5.00e-04, by the old schedule 1.00e-04",
    ),
    # warmup over 4 steps: step 2 is half way up, step 3 three quarters
    "warmup": (
        1,
        {"optim__schedule__warmup_steps": 4},
        "optim.schedule.warmup_steps: 2 -> 4: the learning rate of step 2 is 5.00e-04, by the old schedule 1.00e-03",
    ),
    "not yet": (
        1,
        {"steps": 12},
        "steps: 6 -> 12: the learning rate of step 2 is 1.00e-03 as before; step 3 has 9.78e-04, by the old schedule 8.68e-04",
    ),
    "all done": (6, {"optim__lr": 2e-3}, "optim.lr: 0.001 -> 0.002: all steps are done"),
    "of another kind": (3, {"checkpoint": {"interval_steps": 7}}, "checkpoint.interval_steps: 500 -> 7"),
    "a null": (3, {"optim__grad_clip": None}, "optim.grad_clip: 1.0 -> null"),
    "a list": (3, {"optim__betas": [0.9, 0.99]}, "optim.betas: [0.9, 0.95] -> [0.9, 0.99]"),
    "a method's option": (
        3,
        {"methods": [{"name": "lir", "initializer_range": 0.03}, {"name": "mu_loss"}]},
        "methods.lir.initializer_range: 0.02 -> 0.03",
    ),
    "the order of methods": (
        3,
        {"methods": TRAINED["methods"][::-1]},
        "order of methods: lir, mu_loss -> mu_loss, lir",
    ),
    "DeepSpeed's file": (
        3,
        {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 9}}},
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size: absent -> 9",
    ),
    "validation": (
        3,
        {"data__val": "v"},
        "data.val: null -> v: validation losses before and after are not of the same text",
    ),
    "model": (3, {"model__hidden_size": 128}, "model.hidden_size: 64 -> 128"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_key_that_differs_is_named_with_both_values_and_what_follows(checkpoint: Path, name: str) -> None:
    step, keys, expected = CASES[name]
    assert said(checkpoint, step, **keys) == [expected]


def test_several_keys_of_the_schedule_have_a_line_each_and_one_effect(checkpoint: Path) -> None:
    lines = said(checkpoint, 6, steps=None, tokens=12 * 256.0, optim__lr=2e-3)
    assert lines == [
        "steps: 6 -> null",
        "tokens: null -> 3072.0",
        "optim.lr: 0.001 -> 0.002: the learning rate of step 7 is 1.10e-03; the old schedule ended with 1.00e-04 at step 6",
    ]


def test_the_place_of_a_run_and_keys_that_an_older_version_lacks_are_no_changes(checkpoint: Path) -> None:
    stored = yaml.safe_load((checkpoint / "config.yaml").read_text())
    del stored["resilience"], stored["init"], stored["optim"]["zclip"]
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(stored))
    assert said(checkpoint, 6, name="u", out="elsewhere", checkpoint={"resume": str(checkpoint)}) == []
    lines = said(checkpoint, 6, optim__zclip={"alpha": 0.9})
    assert "optim.zclip.alpha: absent -> 0.9" in lines
    assert not [line for line in lines if line.startswith("optim.zclip:")]


def test_a_configuration_that_this_version_does_not_accept_is_still_compared(checkpoint: Path) -> None:
    stored = yaml.safe_load((checkpoint / "config.yaml").read_text())
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({**stored, "tempo": "presto"}))
    assert said(checkpoint, 6, steps=12) == [
        "steps: 6 -> 12: the learning rate of step 7 is 5.50e-04",
        "tempo: presto -> absent",
    ]


def test_other_versions_are_named(checkpoint: Path) -> None:
    assert environment_changes(checkpoint, config(compile="layers")) == []
    from importlib.metadata import version

    record = {"packages": {"torch": "0.1", "numpy": version("numpy")}}
    (checkpoint.parent.parent / "environment.json").write_text(json.dumps(record))
    [change] = environment_changes(checkpoint, config(compile="off"))
    assert str(change) == f"environment.torch: 0.1 -> {version('torch')}"


def test_compiled_blocks_that_were_eager_are_named(checkpoint: Path) -> None:
    (checkpoint.parent.parent / "environment.json").write_text("{}")
    [change] = environment_changes(checkpoint, config(compile="layers"))
    assert change.with_effect == "environment.blocks: eager -> compiled: losses may differ by rounding"


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"steps": 5}, "Raise steps"), ({"steps": None, "tokens": 5 * 256.0}, "tokens, 1280, are 5 steps")],
)
def test_fewer_steps_than_trained_are_refused_as_many_are_not(checkpoint: Path, keys: dict, named: str) -> None:
    check_length(checkpoint, 5, config(**keys))
    with pytest.raises(UserError, match="it has trained 6 steps, this run asks for 5 in all") as refusal:
        check_length(checkpoint, 6, config(**keys))
    assert named in str(refusal.value)
    assert "checkpoint.resume=never" in str(refusal.value)
