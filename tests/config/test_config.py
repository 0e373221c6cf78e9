"""The run file: its meaning, the effect of `--set`, and that each mistake names its place and the nearest key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from pretrain.config.model_section import ROPE_TYPES, rope_keys
from pretrain.config.schema import Config, load_config
from pretrain.config.yaml_file import RunFile
from pretrain.errors import UserError

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
    file.write_text(TEXT.replace(old, new), encoding="utf-8")


def test_a_run_file_becomes_typed_values(file: Path) -> None:
    config = load_config(file)
    assert config.optim.lr == 1e-3
    assert config.model.hf_fields == {"hidden_size": 64}
    assert [method.name for method in config.methods] == ["lir", "tvr"]
    assert config.folder == Path("runs/run")
    assert config.tokens_per_step == 256
    assert config.data.val is None


def test_off_and_the_booleans_of_older_files_are_kinds_of_recomputation(file: Path, tmp_path: Path) -> None:
    """YAML reads a bare `off` as false."""
    kinds = {"off": "off", "false": "off", "true": "full", "full": "full", "selective": "selective"}
    for given, kind in kinds.items():
        assert load_config(file, [f"activation_checkpointing={given}"]).activation_checkpointing == kind
    assert "Input should be 'off', 'full' or 'selective'" in mistakes(file, "activation_checkpointing=some")
    assert load_config(file).compile is None
    assert load_config(file, ["compile=off"]).compile == "off"
    assert "Input should be 'off' or 'layers'" in mistakes(file, "compile=true")
    written = tmp_path / "written.yaml"
    written.write_text(load_config(file, ["compile=off"]).to_yaml())
    assert load_config(written).compile == "off"


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
        ("  seq_len: 32\n", "", "run.yaml:6: the key 'data.seq_len' is missing"),
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
        ("{name: lir}", "{name: WeSaR}", "run.yaml:15: methods.0: unknown name 'WeSaR'; did you mean 'wesar'?"),
        ("{name: lir}", "{name: Weight-Norm}", "unknown name 'Weight-Norm'; did you mean 'weight_norm'?"),
        ("{name: lir}", "{name: muon}", "unknown name 'muon'; it is chosen by another key: 'optim.name: muon'"),
        ("{name: lir}", "wesar", "run.yaml:15: methods.0: give a mapping such as {name: wesar} (got 'wesar')"),
        ("{name: lir}", "3", "run.yaml:15: methods.0: give a mapping such as {name: ...} (got 3)"),
        ("{name: lir}", "{name: lir, std: 1}", "'methods.0.std'; valid here: name, initializer_range, scale_factor"),
        (
            "{name: lir}",
            "{name: independent_weight_decay, weight_decay: 1}",
            "did you mean 'optim.weight_decay'? valid here: name, coefficient",
        ),
        ("target_std: 0.01", "roles: []", "run.yaml:17: methods.1.roles: without a role there is nothing to hold"),
        ("  lr: 1e-3", "  lr: 1e-3\n  betas: 0.9", "run.yaml:14: optim.betas: give a list (got 0.9)"),
        ("{name: lir}", "{name: tvr}", "run.yaml:14: methods lists tvr more than once"),
        ("{name: lir}", "{name: sigma_reparam}", "run.yaml:14: methods sigma_reparam and tvr cannot be combined"),
        (
            "train: shards",
            "train: []",
            "data.train: give a shard folder, or a list of mappings of the keys path, weight",
        ),
        (
            "train: shards",
            "train: 3",
            "data.train: give a shard folder, or a list of mappings of the keys path, weight",
        ),
        ("train: shards", "train: [{path: a, weight: 0}]", "data.train.0.weight: Input should be greater than 0"),
        ("train: shards", "train: [{path: a}, {path: a/}]", "data.train: lists a more than once"),
        ("train: shards", "train: [{path: a}, {path: ./b/../a}]", "data.train: lists a more than once (as ./b/../a)"),
        ("train: shards", "train: [{path: a, wieght: 1}]", "unknown key 'data.train.0.wieght'; did you mean"),
        ("  seq_len: 32", "  seq_len: 32\n  shuffle: {window_shards: 4}", "window_shards has no effect here"),
    ],
)
def test_a_mistake_names_its_line_its_key_and_the_nearest_valid_one(
    file: Path, old: str, new: str, expected: str
) -> None:
    replace(file, old, new)
    assert expected in mistakes(file)


def test_all_mistakes_are_listed_at_once(file: Path) -> None:
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
        ("init.bound=2", "--set init.bound=2: init: its 'distribution' is missing"),
        ("optim={}", "--set optim={}: the key 'optim.lr' is missing"),
        ("methods=[{}, {name: tvr, sdt: 1}]", "--set methods=[{}, {name: tvr, sdt: 1}]: unknown key 'methods.1.sdt'"),
        ("methods=lir", "--set methods=lir: methods: give a list, such as [{name: lir}] (got 'lir')"),
        ("methods={name: LIR}", "methods: give a list, such as [{name: lir}]"),
        ("methods=null", "methods: give a list, such as [{name: ...}] (got null)"),
        ("optim=3", "--set optim=3: optim: give a mapping of the keys name, lr,"),
        ("init=uniform", "init: give a mapping such as {distribution: uniform} (got 'uniform')"),
        ("methods=[{name: mu_loss}, {name: mu_centering}]", "{name: mu_centering}]: methods mu_loss and mu_centering"),
        ("extends=other.yaml", "--set extends=other.yaml: unknown key 'extends'"),
    ],
)
def test_a_wrong_override_is_quoted(file: Path, override: str, expected: str) -> None:
    text = mistakes(file, override)
    assert expected in text
    assert override.split("=")[0].split(".")[0] in text


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n"])
def test_a_file_without_keys_is_refused(file: Path, content: str) -> None:
    file.write_text(content, encoding="utf-8")
    assert str(file) in mistakes(file)


def test_yaml_that_does_not_parse_names_its_line(file: Path) -> None:
    file.write_text("name: run\nmodel: {family: llama\n", encoding="utf-8")
    assert str(file) in mistakes(file)
    assert "line" in mistakes(file)


def test_a_configuration_cannot_be_changed_afterwards(file: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(file).optim.lr = 1.0


# `extends`


@pytest.fixture
def child(file: Path) -> Callable[[str], Path]:
    """Return a function that writes a run file that extends `file`, with its text from line 2 on."""

    def write(text: str) -> Path:
        path = file.parent / "child.yaml"
        path.write_text(f"extends: {file.name}\n{text}")
        return path

    return write


def test_a_file_that_says_only_what_it_extends_is_its_base(file: Path, child: Callable[[str], Path]) -> None:
    assert load_config(child("")) == load_config(file)


def test_mappings_merge_deeply_while_lists_and_scalars_replace(file: Path, child: Callable[[str], Path]) -> None:
    replace(file, "  lr: 1e-3", "  lr: 1e-3\n  schedule: {name: wsd, warmup_steps: 3}\n  betas: [0.5, 0.6]")
    text = "name: other\noptim:\n  schedule: {warmup_steps: 5}\n  betas: [0.8, 0.9]\nmethods: [{name: lir}]\n"
    config = load_config(child(text + "deepspeed: {bf16: {enabled: true}}\n"))
    assert config.name == "other"
    assert config.optim.lr == 1e-3
    assert (config.optim.schedule.name, config.optim.schedule.warmup_steps) == ("wsd", 5)
    assert config.optim.betas == (0.8, 0.9)
    assert [method.name for method in config.methods] == ["lir"]
    assert config.deepspeed == {"bf16": {"enabled": True}}
    assert [source.path for source in config.data.train] == ["shards"]


def test_a_mixture_keeps_its_order_and_its_weights(file: Path) -> None:
    replace(file, "train: shards", "train: [{path: b, weight: 0.3}, {path: a}]")
    config = load_config(file)
    assert [(source.path, source.weight) for source in config.data.train] == [("b", 0.3), ("a", 1.0)]
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_null_in_the_child_overrides(child: Callable[[str], Path]) -> None:
    config = load_config(child("steps: null\ntokens: 1000\noptim: {grad_clip: null}\n"))
    assert (config.steps, config.total_steps) == (None, 4)
    assert config.optim.grad_clip is None


def test_set_comes_on_top_of_all_files(child: Callable[[str], Path]) -> None:
    config = load_config(child("optim: {lr: 2e-3}\n"), ["optim.lr=3e-3", "data.seq_len=64", "methods.1.target_std=0.5"])
    assert (config.optim.lr, config.data.seq_len, config.methods[1].target_std) == (3e-3, 64, 0.5)


def test_a_base_may_extend_another_each_named_relative_to_the_file_that_says_it(file: Path) -> None:
    folder = file.parent / "deep/deeper"
    folder.mkdir(parents=True)
    (file.parent / "deep/middle.yaml").write_text("extends: ../run.yaml\nseed: 1\nsteps: 20\n")
    (folder / "child.yaml").write_text("steps: 30\nextends: ../middle.yaml\n")
    config = load_config(folder / "child.yaml")
    assert (config.name, config.seed, config.steps) == ("run", 1, 30)
    assert config.deepspeed == "ds.json"  # paths in a file have the meaning that they have without `extends`


def test_the_resolved_file_does_not_extend_anything(child: Callable[[str], Path], tmp_path: Path) -> None:
    config = load_config(child("seed: 5\n"))
    assert "extends" not in yaml.safe_load(config.to_yaml())
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_another_family_does_not_inherit_the_keys_of_the_base_model(child: Callable[[str], Path]) -> None:
    config = load_config(child("model: {family: gpt2, n_embd: 48}\n"))
    assert (config.model.family, config.model.hf_fields) == ("gpt2", {"n_embd": 48})
    same = load_config(child("model: {family: llama, intermediate_size: 48}\n"))
    assert same.model.hf_fields == {"hidden_size": 64, "intermediate_size": 48}


def test_another_distribution_does_not_inherit_the_options_of_the_bases(
    file: Path, child: Callable[[str], Path]
) -> None:
    replace(file, "steps: 10", "steps: 10\ninit: {distribution: truncated_normal, bound: 2}")
    assert load_config(child("init: {distribution: uniform}\n")).init.distribution == "uniform"
    assert load_config(child("init: {bound: 1.5}\n")).init.bound == 1.5


def test_keys_that_share_one_mapping_in_the_base_are_overridden_one_by_one(
    file: Path, child: Callable[[str], Path]
) -> None:
    replace(file, "steps: 10", "steps: 10\ncheckpoint: &often {interval_steps: 5}\neval: *often")
    config = load_config(child("eval: {interval_steps: 7}\n"))
    assert (config.checkpoint.interval_steps, config.eval.interval_steps) == (5, 7)


@pytest.mark.parametrize(
    ("in_base", "in_child", "expected"),
    [
        (("  seq_len: 32", "  seq_len: none"), "data: {train: other}", "run.yaml:8: data.seq_len"),
        (("  lr: 1e-3", "  lrr: 1e-3"), "optim:\n  lr: 1", "run.yaml:13: unknown key 'optim.lrr'"),
        (("name: tvr", "name: tvrr"), "seed: 1", "run.yaml:16: methods.1: unknown name 'tvrr'"),
        (None, "data:\n  seq_len: none", "child.yaml:3: data.seq_len"),
        (None, "optim: {lrr: 1e-3}", "child.yaml:2: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (None, "methods:\n  - {name: lir}\n  - {name: tvr, target_sdt: 1}", "child.yaml:4: unknown key 'methods.1."),
        (None, "optim: null", "child.yaml:2: optim"),
        (("  seq_len: 32\n", ""), "seed: 1", "run.yaml:6: the key 'data.seq_len' is missing"),
        (("  seq_len: 32\n", ""), "data: {train: other}", "child.yaml:2: the key 'data.seq_len' is missing"),
        (None, "methods: [{name: lir}, {}]", "child.yaml:2: methods.1: its 'name' is missing"),
        (None, "model: {family: gpt2, hiden_size: 4}", "child.yaml:2: unknown key 'model.hiden_size'"),
        (("name: run\n", ""), "", "child.yaml: the key 'name' is missing"),
    ],
)
def test_a_mistake_names_the_file_that_makes_it(
    file: Path, child: Callable[[str], Path], in_base: tuple[str, str] | None, in_child: str, expected: str
) -> None:
    if in_base:
        replace(file, *in_base)
    text = mistakes(child(in_child))
    assert expected in text
    assert len(text.splitlines()) == 2


def test_a_list_that_is_replaced_leaves_no_lines_behind(file: Path, child: Callable[[str], Path]) -> None:
    path = child("methods:\n  - {name: lir}\n  - {name: tvr}\n")
    assert RunFile(path).where("methods.1.target_std") == f"{path}:4"
    assert RunFile(file).where("methods.1.target_std") == f"{file}:17"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("nowhere.yaml", "cannot read the run file"),
        ("broken.yaml", "is not valid YAML"),
        ("empty.yaml", "holds no configuration"),
        ("twice.yaml", "twice.yaml:2: the key 'name' stands twice"),
        (".", "cannot read the run file"),
        ("[run.yaml]", "give the path of one run file (got ['run.yaml'])"),
        ("null", "give the path of one run file (got None)"),
    ],
)
def test_a_base_that_cannot_be_read_names_the_line_that_extends_it(file: Path, named: str, expected: str) -> None:
    (file.parent / "broken.yaml").write_text("a: [1")
    (file.parent / "empty.yaml").write_text("")
    (file.parent / "twice.yaml").write_text("name: a\nname: b\n")
    path = file.parent / "child.yaml"
    path.write_text(f"# a comment\nextends: {named}\n")
    text = mistakes(path)
    assert text.startswith(f"{path}:2: extends: ")
    assert expected in text


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    for path, base in zip(paths, ("b.yaml", "c.yaml", f"../{tmp_path.name}/b.yaml"), strict=True):
        path.write_text(f"seed: 1\nextends: {base}\n")
    text = mistakes(paths[0])
    assert f"{paths[2]}:2: extends: the files extend each other in a circle" in text
    paths[0].write_text("extends: a.yaml\n")
    assert f"{paths[0]}:1: extends: the files extend each other in a circle" in mistakes(paths[0])


# values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=.inf", "optim.lr: Input should be a finite number (got .inf)"),
        ("optim.lr=1e400", "optim.lr: Input should be a finite number (got 1e400)"),
        ("optim.lr=.nan", "optim.lr: Input should be a finite number (got .nan)"),
        ('optim.lr="1e-3"', "(got '1e-3'): a text, because of the quotes; leave them out"),
        ("optim.eps=1e-50", "optim.eps: is so small that float32 takes it for zero (got 1e-50)"),
        ("model.rms_norm_eps=1e-50", "model.rms_norm_eps: is so small that float32 takes it for zero"),
        ("optim.betas=[0.9, .nan]", "optim.betas.1: Input should be a finite number"),
        ("steps=true", "steps: Input should be a valid integer (got true)"),
        ("steps=1:30", "(got '1:30'): some readers of YAML take this for a number in base 60"),
        ("steps=010", "(got '010'): a leading 0 means base 8 to some readers of YAML; write 10"),
        ('steps="[1"', "steps: Input should be a valid integer (got '[1')"),
        ("steps=1.5", "steps: Input should be a valid integer (got 1.5)"),
        ("steps=99999999999999999999", "steps: is larger than a 64-bit integer can be"),
        ("seed=18446744073709551616", "seed: Input should be less than 281474976710656"),
        ("data.document_attention=1", "Input should be a valid boolean (got 1)"),
        ("parallel.sequence=true", "parallel.sequence: Input should be a valid integer (got true)"),
        ("methods=[{name: tvr, target_std: true}]", "methods.0.target_std: Input should be a valid number (got true)"),
        ("init={distribution: truncated_normal, bound: true}", "init.bound: Input should be a valid number"),
        ("data.train=[{path: a, weight: true}]", "data.train.0.weight: Input should be a valid number (got true)"),
        ("optim.weight_decay=1e4", "optim.weight_decay: 10000 times the learning rate 0.001 must be below 1"),
        ("resilience.watchdog_s=1e-3", "resilience.watchdog_s: Input should be greater than or equal to 1"),
        ("checkpoint.resume=no", "auto, never, or the path of a checkpoint (got no): YAML reads no as false"),
        ("name=null", "name: Input should be a valid string (got null): YAML reads null as nothing"),
        ("name=1e3", "(got 1e3): YAML reads 1e3 as the number 1000; for the text write it in quotes"),
        ("name=-x", "name: is no name for a folder"),
        (f"name={'x' * 256}", "is longer than the 255 bytes that file systems take"),
        ("out=", "there is no value; null leaves a key without one"),
        ('out=""', "out: is empty: give a path"),
        ("deepspeed=3", "deepspeed: give the path of a DeepSpeed JSON file, or its content as a mapping (got 3)"),
        ("a={b: &x [*x]}", "not valid YAML"),
    ],
)
def test_a_value_of_another_kind_is_refused_and_shown_as_it_was_written(
    file: Path, override: str, expected: str
) -> None:
    assert expected in mistakes(file, override)


def test_a_file_in_another_encoding_is_refused_with_what_to_do(file: Path) -> None:
    file.write_bytes("name: größe\n".encode("latin-1"))
    assert f"{file} is not UTF-8 at byte 8. Save it in this encoding." in mistakes(file)


def test_what_the_file_itself_says_is_shown_as_it_was_written(file: Path) -> None:
    replace(file, "steps: 10", "steps: 0x1G\ncheckpoint: {resume: no}")
    assert "run.yaml:11: steps: Input should be a valid integer (got '0x1G')" in mistakes(file)
    assert "run.yaml:12: checkpoint.resume: give auto, never" in mistakes(file)


@pytest.mark.parametrize("name", ["007", "2026-11-30", "1e3", "no", "1:30", "1_000", "0x10", ".5", "null"])
def test_names_that_look_like_something_else_read_back_as_the_same(file: Path, tmp_path: Path, name: str) -> None:
    config = load_config(file, [f'out="{name}"', "name='1e3'"])
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load(config.to_yaml())["out"] == config.out  # as other readers of YAML read it


def test_whole_numbers_may_be_written_with_an_exponent_or_underscores(file: Path) -> None:
    assert load_config(file, ["steps=1e4"]).steps == load_config(file, ["steps=10_000"]).steps == 10_000
    assert load_config(file, ["name=2026-11-30"]).name == "2026-11-30"


# the model


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hidden_act=silly", "model.hidden_act: there is no such activation here; there are: gelu,"),
        ("model.head_dim=0", "model.head_dim: Input should be greater than 0 (got 0)"),
        ("model.head_dim=5", "model.head_dim: rotary positions need heads of an even size, not 5"),
        ("model.num_attention_heads=0", "model.num_attention_heads: Input should be greater than 0"),
        (
            "model.num_attention_heads=3",
            "model.num_attention_heads: the 3 attention heads do not divide hidden_size 64",
        ),
        ("model.num_key_value_heads=0", "model.num_key_value_heads: Input should be greater than 0"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads: 3 does not divide num_attention_heads 32"),
        ("model.hidden_size=0", "model.hidden_size: Input should be greater than 0"),
        ("model.hidden_size=wide", "model.hidden_size: Input should be a valid integer (got 'wide')"),
        ("model.hidden_size=66", "model.hidden_size: the 32 attention heads do not divide hidden_size 66"),
        ("model.pad_token_id=-1", "model.pad_token_id: Input should be greater than or equal to 0"),
        ("model.eos_token_id=[1, x]", "model.eos_token_id: give one token id, or a list of them"),
        ("model.attention_dropout=1", "model.attention_dropout: Input should be less than 1"),
        ("model.rms_norm_eps=0", "model.rms_norm_eps: Input should be greater than 0"),
        ("model.tie_word_embeddings=1", "model.tie_word_embeddings: Input should be a valid boolean"),
        ("model.rope_parameters={rope_type: foo}", "no such rope type; there are: default, linear, dynamic, yarn"),
        ("model.rope_parameters={rope_type: linear, rope_theta: 1e4}", "rope_type linear needs factor"),
        ("model.rope_parameters={rope_theta: abc}", "model.rope_parameters.rope_theta: Input should be a valid number"),
        ("model.rope_parameters={factor: 2}", "rope_type default does not take factor, only: rope_theta"),
        ("model.rope_parameters={rope_thta: 2}", "did you mean 'model.rope_parameters.rope_theta'?"),
        (
            "model.rope_parameters={rope_type: longrope, short_factor: [1, 1], long_factor: [1]}",
            "short_factor needs one number for each of the 1 frequencies",
        ),
        ("model.torch_dtype=bfloat16", "unknown key 'model.torch_dtype'; leave it out: the DeepSpeed file says"),
        ("model.model_type=llama", "unknown key 'model.model_type'; it is called 'family' here"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_at_its_key(file: Path, override: str, expected: str) -> None:
    assert expected in mistakes(file, override)


def test_fields_of_gpt2_have_two_names_and_one_value(child: Callable[[str], Path]) -> None:
    assert "n_head: the 5 attention heads do not divide hidden_size 48" in mistakes(
        child("model: {family: gpt2, n_embd: 48, n_head: 5}\n")
    )
    assert "model.hidden_size: is another name of 'n_embd'" in mistakes(
        child("model: {family: gpt2, n_embd: 48, n_head: 4, hidden_size: 48}\n")
    )


# The values of Llama 3.1's config.json, and what transformers reads from them.
LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_older_spelling_of_rope_means_what_transformers_takes_it_for(file: Path, tmp_path: Path, kind: str) -> None:
    older = {"rope_theta": 500000.0, "rope_scaling": {kind: "llama3", **LLAMA_31}}
    config = load_config(file, [f"model.{key}={json.dumps(value)}" for key, value in older.items()])
    theirs = LlamaConfig(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA_31})
    assert config.model.hf_fields["rope_parameters"] == theirs.rope_parameters
    assert config.model.hf_fields.keys() == {"hidden_size", "rope_parameters"}
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    assert load_config(tmp_path / "resolved.yaml").to_yaml() == config.to_yaml()


@pytest.mark.parametrize(
    ("newer", "older", "fault"),
    [
        ("{rope_theta: 1e4}", "rope_theta=1e4", None),
        ("{rope_type: linear, factor: 2}", "rope_scaling={type: linear, factor: 2}", None),
        ("{rope_theta: 1e4}", "rope_theta=1e5", "model.rope_theta: says rope_theta 100000.0"),
        ("{rope_type: default}", "rope_scaling={type: linear, factor: 2}", "says rope_type linear"),
        ("null", "rope_scaling={type: linear, rope_type: yarn, factor: 2}", "model.rope_scaling.type: 'linear' is not"),
    ],
)
def test_two_spellings_of_rope_must_agree(file: Path, newer: str, older: str, fault: str | None) -> None:
    overrides = (f"model.rope_parameters={newer}", f"model.{older}")
    if fault is None:
        assert load_config(file, overrides).model == load_config(file, overrides[:1]).model
    else:
        assert fault in mistakes(file, *overrides)


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_what_a_rope_type_needs_is_what_transformers_asks_for(kind: str) -> None:
    required, optional = rope_keys(kind)
    everything = {key: 2.0 for key in required | optional} | {"rope_type": kind}
    if kind == "longrope":
        everything |= {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64}
    LlamaConfig(rope_parameters=dict(everything))
    for key in required - {"rope_type", "rope_theta", "original_max_position_embeddings"}:
        with pytest.raises(KeyError, match=key):
            LlamaConfig(rope_parameters={name: value for name, value in everything.items() if name != key})


# paths


def test_variables_and_home_folders_are_filled_in_in_every_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("NESTED", "~/nested")
    settings = {
        "out": "~/runs",
        "tokenizer": "$SCRATCH/tok",
        "data.train": "${SCRATCH}/train",
        "data.val": "$NESTED/val",
        "deepspeed": "~/ds.json",
        "checkpoint.resume": "~/runs/x/checkpoints/latest",
    }
    config = load_config(file, [f"{key}={value}" for key, value in settings.items()])
    assert config.out == "/home/me/runs"
    assert config.tokenizer == "/scratch/me/tok"
    assert config.data.train[0].path == "/scratch/me/train"
    assert config.data.val == "/home/me/nested/val"
    assert config.deepspeed == "/home/me/ds.json"
    assert config.checkpoint.resume == "/home/me/runs/x/checkpoints/latest"
    mixture = load_config(file, ["data.train=[{path: $SCRATCH/a}, {path: 's3://bucket/$b'}]"])
    assert [source.path for source in mixture.data.train] == ["/scratch/me/a", "s3://bucket/$b"]
    monkeypatch.setenv("HOME", "/home/other")
    (file.parent / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(file.parent / "resolved.yaml") == config  # what was meant when it was written


def test_the_cache_folder_is_filled_in_on_the_node_that_uses_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DISK", "/local/0")
    config = load_config(file, ["data.cache.folder=$LOCAL_DISK/cache"])
    assert config.data.cache.folder == "$LOCAL_DISK/cache"
    assert config.data.cache.path == Path("/local/0/cache")
    monkeypatch.delenv("LOCAL_DISK")  # a machine that only converts or evaluates does not need it
    config = load_config(file, ["data.cache.folder=$LOCAL_DISK/cache"])
    with pytest.raises(UserError, match=r"data.cache.folder '\$LOCAL_DISK/cache': \$LOCAL_DISK is not set here"):
        _ = config.data.cache.path


@pytest.mark.parametrize("key", ["out", "tokenizer", "data.train", "data.val", "deepspeed", "checkpoint.resume"])
@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("$UNSET/x", "$UNSET is not set here"),
        ("${UNSET}/x", "$UNSET is not set here"),
        ("$EMPTY/x", "$EMPTY is empty here"),
        ("${SET:-x}/x", "${SET:-x} is no variable"),
        ("~no_such_user/x", "~no_such_user stands for a home folder, and there is none"),
        (f"a/{'x' * 300}", "is longer than the 255 bytes"),
        ("x/" * 3000, "is longer than the 4,000 bytes"),
        ('"a\\0b"', "holds a control character"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, key: str, path: str, fault: str
) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SET", "set")
    text = mistakes(file, f"{key}={path}")
    assert f"{key}: " in text
    assert fault in text


def test_a_run_cannot_be_written_to_a_url(file: Path) -> None:
    assert "out: is a URL" in mistakes(file, "out=s3://bucket/runs")


def test_a_base_may_be_named_by_a_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file.parent / "child.yaml"
    monkeypatch.setenv("BASES", str(file.parent))
    path.write_text("extends: $BASES/run.yaml\nseed: 4\n")
    assert load_config(path).seed == 4
    monkeypatch.delenv("BASES")
    assert f"{path}:1: extends: $BASES is not set here" in mistakes(path)
