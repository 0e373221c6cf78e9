"""The run file: what it means, what `--set` changes, and that each mistake names its place and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config import Config, load_config
from pretrain.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

TEXT = """\
name: run
model:
  family: llama
  hidden_size: 64
tokenizer: tok
data:
  train: shards
  seq_len: 32
  global_batch_size: 8
  micro_batch_size: 2
steps: 10
optim:
  lr: 1e-3
methods:
  - {name: lir}
  - name: tvr
    target_std: 0.01
deepspeed: ds.json
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def mistakes(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def replace(file: Path, old: str, new: str) -> None:
    assert TEXT.count(old) == 1
    file.write_text(TEXT.replace(old, new))


def test_a_run_file_becomes_typed_values(file: Path) -> None:
    config = load_config(file)
    assert config.optim.lr == 1e-3
    assert config.model.hf_fields == {"hidden_size": 64}
    assert [method.name for method in config.methods] == ["lir", "tvr"]
    assert config.folder == Path("runs/run")
    assert config.tokens_per_step == 256
    assert config.data.val is None


def test_tokens_are_turned_into_the_steps_that_cover_them(file: Path) -> None:
    replace(file, "steps: 10", "tokens: 1000")
    assert load_config(file).total_steps == 4
    assert load_config(file, ["tokens=1024"]).total_steps == 4
    assert load_config(file, ["tokens=100e9"]).total_steps == 390_625_000


def test_set_overrides_keys_at_any_depth(file: Path) -> None:
    overrides = ["optim.lr=3e-4", "optim.schedule.warmup_steps=5", "methods.1.target_std=0.02", "data.val=other"]
    config = load_config(file, [*overrides, "log.wandb.mode=offline", "optim.betas=[0.8, 0.9]", "name=other"])
    assert config.optim.lr == 3e-4
    assert config.optim.schedule.warmup_steps == 5
    assert config.methods[1].target_std == 0.02
    assert config.data.val == "other"
    assert config.log.wandb.mode == "offline"
    assert config.optim.betas == (0.8, 0.9)
    assert config.name == "other"


def test_the_resolved_file_reads_back_as_the_same_configuration(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["methods.1.exclude=[a.weight]", "model.tie_word_embeddings=true"])
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  lr: 1e-3",
            "  lr: 1e-3\n  wieght_decay: 0.1",
            "run.yaml:14: unknown key 'optim.wieght_decay'; did you mean",
        ),
        ("steps: 10", "stepps: 10", "run.yaml:11: unknown key 'stepps'; did you mean 'steps'?"),
        ("  seq_len: 32\n", "", "the key 'data.seq_len' is missing"),
        (
            "hidden_size: 64",
            "hiden_size: 64",
            "run.yaml:4: unknown key 'model.hiden_size'; did you mean 'model.hidden_size'",
        ),
        ("family: llama", "family: lama", "did you mean 'llama'?"),
        ("name: tvr", "name: tvrr", "did you mean 'tvr'?"),
        ("target_std: 0.01", "target_sdt: 0.01", "run.yaml:17: unknown key 'methods.1.target_sdt'"),
        ("target_std: 0.01", "target_std: -1", "run.yaml:17: methods.1.target_std"),
        ("steps: 10", "steps: 10\nwarmup_steps: 3", "did you mean 'optim.schedule.warmup_steps'?"),
        ("steps: 10", "steps: ten", "run.yaml:11: steps"),
        ("name: run", "name: a/b", "run.yaml:1: name"),
        ("steps: 10", "", "either 'steps' or 'tokens'"),
        ("steps: 10", "steps: 10\ntokens: 5", "either 'steps' or 'tokens'"),
        ("{name: lir}", "{name: tvr}", "methods lists tvr more than once"),
        ("tokenizer: tok", "tokenizer: tok\nname: twice", "the key 'name' stands twice"),
    ],
)
def test_a_mistake_names_its_line_its_key_and_the_nearest_valid_one(
    file: Path, old: str, new: str, expected: str
) -> None:
    replace(file, old, new)
    assert expected in mistakes(file)


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    text = mistakes(file, "optim.lr=-1", "data.seq_length=3", "steps=0")
    for part in ("--set optim.lr=-1", "unknown key 'data.seq_length'; did you mean 'data.seq_len'?", "--set steps=0"):
        assert part in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "expected key=value"),
        ("optim.lr=[1", "not valid YAML"),
        ("methods.7.target_std=1", "methods"),
        ("name.first=x", "--set name.first=x"),
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
    ],
)
def test_a_wrong_override_is_quoted(file: Path, override: str, expected: str) -> None:
    text = mistakes(file, override)
    assert expected in text
    assert override.split("=")[0].split(".")[0] in text


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n"])
def test_a_file_without_keys_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    assert str(file) in mistakes(file)


def test_yaml_that_does_not_parse_names_its_line(file: Path) -> None:
    file.write_text("name: run\nmodel: {family: llama\n")
    assert str(file) in mistakes(file)
    assert "line" in mistakes(file)


def test_a_configuration_cannot_be_changed_afterwards(file: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(file).optim.lr = 1.0


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_file_is_valid_and_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert (REPOSITORY / config.deepspeed).is_file()
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_the_one_billion_run_is_the_papers() -> None:
    config = load_config(REPOSITORY / "configs/1b_tvr.yaml")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [config.model.hf_fields[size] for size in sizes] == [2048, 5440, 16, 16]
    assert (config.data.seq_len, config.data.global_batch_size) == (2048, 4032)
    assert config.total_steps * config.tokens_per_step == pytest.approx(100e9, rel=1e-3)
    assert config.optim.lr == 6e-4
    assert config.optim.lr * config.optim.schedule.min_lr_ratio == pytest.approx(6e-5)
    assert config.optim.schedule.warmup_steps * config.tokens_per_step == pytest.approx(1e9, rel=0.01)
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.1)
