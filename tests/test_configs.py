"""The shipped run files: each starts, has the size that its name says, and every method has one at 130M and at 1B."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from corpus import Corpus

from pretrain import plan as plans
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.methods import REGISTRY
from pretrain.optim import learning_rate

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BASES = sorted(CONFIGS.rglob("base_*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(BASES))
SIZES = ("130m", "1b")

# Parameters of models whose names do not count what they have; the demo, with the vocabulary of the tests.
NAMED_OTHERWISE = {"lns_1b": 1.34e9, "tiny_baseline": 3.3e6, "tiny_tvr": 3.3e6}


def of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=of)
def test_a_run_file_reads_back_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("path", RUNS, ids=of)
def test_a_run_file_starts_on_the_ranks_of_the_table_with_the_size_of_its_name(
    path: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that `--dry-run` checks, but for the disk and with other data."""
    monkeypatch.setattr(plans, "_check_disk", lambda plan: None)
    data = [f"data.train={corpus.train}", "data.val=null", "data.seq_len=8"]
    config = load_config(path, [f"tokenizer={corpus.tokenizer}", *data, f"out={tmp_path}"])
    ranks = config.data.global_batch_size // config.data.micro_batch_size
    assert column_of_table(path, 4) == str(ranks)
    plan = plans.make_plan(config, ranks)
    parameters = plan.parameters
    if path.stem.startswith("oec_"):  # this paper's sizes count one of the two embeddings
        parameters -= plan.model_config.vocab_size * plan.model_config.hidden_size
    assert parameters == pytest.approx(NAMED_OTHERWISE.get(path.stem) or size_in_name(path), rel=0.1)


def column_of_table(path: Path, column: int) -> str:
    """What the README's table says about a run file."""
    rows = (CONFIGS / "README.md").read_text().splitlines()
    return next(row for row in rows if row.startswith(f"| `{of(path)}` |")).split("|")[column].strip()


def size_in_name(path: Path) -> float:
    number, unit = re.search(r"(\d+\.?\d*)([mb])", path.stem).groups()
    return float(number) * {"m": 1e6, "b": 1e9}[unit]


@pytest.mark.parametrize("size", SIZES)
def test_every_method_has_a_run_file(size: str) -> None:
    paths = {method: CONFIGS / f"{size}_{method}.yaml" for method in REGISTRY}
    assert [method for method, path in paths.items() if not path.is_file()] == []
    for method, path in paths.items():
        assert method in [listed.name for listed in load_config(path).methods]


@pytest.mark.parametrize("size", SIZES)
def test_a_base_lacks_only_a_name(size: str) -> None:
    path = CONFIGS / f"base_{size}.yaml"
    with pytest.raises(UserError, match="the key 'name' is missing") as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2
    assert load_config(path, [f"name={size}_baseline"]) == load_config(CONFIGS / f"{size}_baseline.yaml")


def test_the_one_billion_run_is_the_papers() -> None:
    config = load_config(CONFIGS / "1b_tvr.yaml")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [config.model.hf_fields[size] for size in sizes] == [2048, 5440, 16, 16]
    assert (config.data.seq_len, config.data.global_batch_size) == (2048, 4032)
    assert config.total_steps * config.tokens_per_step == pytest.approx(100e9, rel=1e-3)
    assert config.optim.lr == 6e-4
    assert config.optim.lr * config.optim.schedule.min_lr_ratio == pytest.approx(6e-5)
    assert config.optim.schedule.warmup_steps * config.tokens_per_step == pytest.approx(1e9, rel=0.01)
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.1)


@pytest.mark.parametrize("path", sorted((CONFIGS / "papers").glob("oec_*.yaml")), ids=of)
def test_the_centering_runs_decay_to_the_papers_last_learning_rate(path: Path) -> None:
    config = load_config(path)
    assert learning_rate(config.optim, config.total_steps, config.total_steps) == pytest.approx(1e-5, rel=1e-3)
    assert config.total_steps * config.tokens_per_step == 13_107_200_000
