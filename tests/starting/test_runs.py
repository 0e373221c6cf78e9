"""Whole runs that start from what another run has trained: its export, or its checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoints.folders import resolve
from pretrain.checkpoints.logit_probe import load_probe
from pretrain.checkpoints.state import read_state
from pretrain.export.convert import convert
from tests.support.corpus import Corpus
from tests.support.runs import arguments, assert_refused, events, run_ranks, run_together, status
from tests.support.workers.starting_worker import examine_all, results

SIGMA = {"name": "sigma_reparam"}
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Trained:
    """A run with sigma_reparam, its last checkpoint, its export, and the logits of its model on the probe."""

    checkpoint: Path
    export: Path
    ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = tmp_path_factory.mktemp("trained")
    settings = {"out": str(base), "name": "source", "steps": 4, "methods": [SIGMA]}
    ended = run_ranks(arguments(run_file, settings), base / "logs")
    assert ended.code == 0, ended.stderr
    checkpoint = resolve(base / "source/checkpoints/latest")
    convert(checkpoint, base / "export", torch.float32)
    return Trained(checkpoint, base / "export", *load_probe(checkpoint))


@pytest.fixture(scope="module")
def found(trained: Trained, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    def case(path: Path, *methods: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "deepspeed": {"zero_optimization": {"stage": 3}},
            "model": {"family": "llama", "init_from": str(path), **more.pop("keys", {})},
            "methods": list(methods),
            "tokenizer": str(corpus.tokenizer),
            "tokens": trained.ids.tolist(),
            "forward": read_state(trained.checkpoint).forward,
            **more,
        }

    in_bf16 = {"zero_optimization": {"stage": 1}}
    cases = {
        "export": case(trained.export),
        "export with wesar": case(trained.export, {"name": "wesar"}),
        "export with other gates": case(trained.export, {"name": "sigma_reparam", "variance": 1e-3}),
        "checkpoint": case(trained.checkpoint, SIGMA),
        "checkpoint on zero1": case(trained.checkpoint, SIGMA, deepspeed=in_bf16),
        "by its latest": case(trained.checkpoint.parent / "latest", SIGMA),
        "other options": case(trained.checkpoint, {"name": "sigma_reparam", "variance": 1e-3}, forward="another"),
        "no methods": case(trained.checkpoint, forward="another"),
        "more blocks": case(
            trained.checkpoint, SIGMA, keys={"init_from": {"path": str(trained.checkpoint), "layers": [0, 1, 1]}}
        ),
    }
    out = tmp_path_factory.mktemp("found")
    ended = run_ranks([], out / "logs", prepare=partial(examine_all, cases, out))
    assert ended.code == 0, ended.stderr[-5000:]
    return results(out)


SAME = ("export", "export with wesar", "export with other gates", "checkpoint", "checkpoint on zero1", "by its latest")


@pytest.mark.parametrize("name", SAME)
def test_what_was_trained_is_what_the_next_run_starts_from(
    trained: Trained, found: dict[str, dict[str, Any]], name: str
) -> None:
    assert "refused" not in found[name], found[name]
    error = (found[name]["logits"] - trained.logits).abs().max() / trained.logits.abs().max()
    assert error < 1e-5


def test_a_checkpoint_gives_its_masters_to_the_bit(trained: Trained, found: dict[str, dict[str, Any]]) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = trained.checkpoint / "deepspeed"
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    for name, master in found["checkpoint"]["masters"].items():
        assert torch.equal(master.flatten(), expected[name].flatten()), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other options", "does not list the same methods with the same options"),
        ("no methods", "does not list the same methods"),
        ("more blocks", "belong to its own blocks"),
    ],
)
def test_a_checkpoint_of_other_methods_is_refused_and_its_export_named(
    found: dict[str, dict[str, Any]], name: str, expected: str
) -> None:
    assert expected in found[name]["refused"]
    assert "convert_to_hf.py --dtype float32" in found[name]["refused"]


def test_a_run_from_an_export_trains_and_resumes_without_it(run_file: Path, trained: Trained, tmp_path: Path) -> None:
    export = Path(shutil.copytree(trained.export, tmp_path / "export"))
    settings = {
        "out": str(tmp_path),
        "name": "next",
        "methods": [],
        "optim.lr": 1e-12,
        "optim.schedule.warmup_steps": 0,
        "steps": 1,
        "model": {"family": "llama", "init_from": str(export)},
    }
    ended = run_ranks(arguments(run_file, settings), tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    assert f"start     unless it resumes: weights of {export}\n" in ended.stdout
    checkpoint = resolve(tmp_path / "next/checkpoints/latest")
    ids, logits = load_probe(checkpoint)
    assert torch.equal(ids, trained.ids)
    assert (logits - trained.logits).abs().max() < 1e-5 * trained.logits.abs().max()
    section = yaml.safe_load((tmp_path / "next/config.yaml").read_text())["model"]
    assert {key: section[key] for key in SIZES} == SIZES
    convert(checkpoint, tmp_path / "again", torch.float32)
    assert f"| started from | the weights of {export} |" in (tmp_path / "again/README.md").read_text()
    shutil.rmtree(export)
    ended = run_ranks(arguments(run_file, {**settings, "steps": 2}), tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    assert "which is not there any more" in ended.stdout
    again = {**settings, "steps": 2, "checkpoint.resume": "never"}
    assert_refused(run_ranks(arguments(run_file, again), tmp_path / "logs", 1), f"{export} does not exist")
    assert [event["step"] for event in events(tmp_path / "next", "resumed")] == [1]
    assert status(tmp_path / "next")["status"] == "finished"


@pytest.mark.slow
def test_a_run_with_deviations_by_role_is_the_start_of_a_larger_one(
    run_file: Path, corpus: Corpus, tmp_path: Path
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deviations = {"embed": 1.0, "q": 0.05, "o": 0.002, "down": 0.004, "head": 0.1}
    settings = {"out": str(tmp_path), "name": "small", "steps": 1, "optim.lr": 1e-12, "methods": []}
    ended = run_ranks(arguments(run_file, {**settings, "init": {"std": deviations}}), tmp_path / "logs")
    assert ended.code == 0, ended.stderr
    checkpoint = resolve(tmp_path / "small/checkpoints/latest")
    small = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), "deepspeed")
    roles = {
        "embed": "embed_tokens",
        "q": "q_proj",
        "o": "o_proj",
        "down": "down_proj",
        "head": "lm_head",
        "up": "up_proj",
    }
    for role, part in roles.items():
        for name in (name for name in small if part in name):
            values, expected = small[name].detach().double(), deviations.get(role, 0.02)  # model.initializer_range
            assert float(values.std()) == pytest.approx(expected, rel=5 / (2 * values.numel()) ** 0.5), name
    case = {
        "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        "model": {"family": "llama", "init_from": {"path": str(checkpoint), "layers": [0, 1, 1, 0]}},
        "tokenizer": str(corpus.tokenizer),
    }
    ended = run_ranks([], tmp_path / "logs", prepare=partial(examine_all, {"grown": case}, tmp_path / "out"))
    assert ended.code == 0, ended.stderr[-3000:]
    grown = results(tmp_path / "out")["grown"]["masters"]
    for block, source in enumerate([0, 1, 1, 0]):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.equal(grown[name].flatten(), small[name.replace(f".{block}.", f".{source}.")].flatten())
    assert torch.equal(grown["lm_head.weight"].flatten(), small["lm_head.weight"].flatten())


def test_a_model_that_cannot_be_loaded_is_refused_by_all_ranks_at_once(
    run_file: Path, trained: Trained, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(trained.export, tmp_path / "damaged"))
    (file,) = damaged.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    checkpoint = Path(shutil.copytree(trained.checkpoint, tmp_path / "checkpoints/step_00000004"))
    shard = next((checkpoint / "deepspeed").glob("*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    def from_there(name: str, path: Path, methods: list[dict[str, Any]], *flags: str) -> tuple[list[str], int]:
        settings = {"out": str(tmp_path / "runs"), "name": name, "steps": 1, "methods": methods}
        return arguments(run_file, {**settings, "model.init_from": str(path)}, *flags), 1 if flags else 2

    ended = run_together(
        {
            "damaged": from_there("damaged", damaged, []),
            "damaged, seen before": from_there("dry", damaged, [], "--dry-run"),
            "sound, seen before": from_there("dry", trained.export, [], "--dry-run"),
            "changed": from_there("changed", checkpoint, [SIGMA]),
            "absent": from_there("absent", tmp_path / "nowhere", []),
        },
        tmp_path / "logs",
    )
    assert_refused(ended["damaged"], str(file), "it is not whole")
    assert_refused(ended["damaged, seen before"], str(file), "it is not whole")
    assert ended["sound, seen before"].code == 0, ended["sound, seen before"].stderr
    assert f"weights of {trained.export}" in ended["sound, seen before"].stdout
    assert_refused(ended["changed"], shard.name, "does not match its checksum")
    assert_refused(ended["absent"], "nowhere does not exist")
    assert not list((tmp_path / "runs").glob("*/checkpoints/step_*"))
