"""The shipped run files: each starts, has the size that its name says, and every method has one at 130M and at 1B."""

from __future__ import annotations

import re
from math import sqrt
from pathlib import Path

import pytest
import yaml

from pretrain.config.schema import Config, load_config
from pretrain.engine.build_model import bind_methods, hf_config, outline
from pretrain.engine.initialize import initial_rule
from pretrain.errors import UserError
from pretrain.methods import REGISTRY
from pretrain.optim.schedule import learning_rate
from pretrain.planning.memory import states_of
from pretrain.trainer import plan as plans
from tests.support.corpus import Corpus
from tests.support.tiny_engines import TinyTokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASES = sorted(CONFIGS.rglob("base_*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(BASES))
SIZES = ("130m", "1b")

# Parameters of models whose names give another number. The demo has the vocabulary of the tests.
NAMED_OTHERWISE = {
    "wesar_small_rapid": 1.34e9,
    "wesar_small_stable": 1.34e9,
    "lns_1b": 1.34e9,
    "demo": 8.6e5,
    "tiny_baseline": 3.3e6,
    "tiny_tvr": 3.3e6,
}


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
    """Check all that `--dry-run` checks, except the disk and with other data."""
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


MEMORY = {  # run file, GPUs, DeepSpeed file, sequence length
    ("130m_tvr", 8, "zero1_bf16", 2048),
    ("1b_tvr", 8, "zero1_bf16", 2048),
    ("1b_tvr", 8, "zero3_bf16", 2048),
    ("7b_tvr", 64, "zero3_bf16", 4096),
    ("7b_tvr", 8, "zero3_bf16", 4096),
    ("7b_tvr", 64, "zero3_hpz_bf16", 4096),
}


@pytest.mark.parametrize(("name", "gpus", "deepspeed", "seq_len"), sorted(MEMORY))
def test_the_memory_of_the_documentation_is_that_of_the_plan(
    name: str, gpus: int, deepspeed: str, seq_len: int, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_check_disk", lambda plan: None)
    data = [f"data.train={corpus.train}", "data.val=null", "data.seq_len=8", f"deepspeed=ds_configs/{deepspeed}.json"]
    config = load_config(CONFIGS / f"{name}.yaml", [f"tokenizer={corpus.tokenizer}", *data, f"out={tmp_path}"])
    plan = plans.make_plan(config, gpus)
    size, tokens = plan.model_config, config.data.micro_batch_size * seq_len
    kept = 24 * size.hidden_size + 8 * size.intermediate_size + 4 * size.num_attention_heads + 8
    loss = 6 * size.vocab_size * size.hidden_size + 20 * (1 << 27)
    stated = memory_in_documentation(name, gpus, deepspeed)
    assert stated[0] == pytest.approx(states_of(plan).device_bytes / 1e9, abs=0.06)
    assert stated[1] == pytest.approx(tokens * size.num_hidden_layers * kept / 1e9, abs=0.06)
    assert stated[2] == pytest.approx(loss / 1e9, abs=0.06)
    gathered = 2.0 if "zero3" in deepspeed else 0.0
    copy = 2 * plan.parameters / 8e9 if "hpz" in deepspeed else 0.0
    assert stated[3] == pytest.approx(sum(stated[:3]) + gathered + copy, abs=0.6)


def test_the_memory_of_the_long_run_is_the_arithmetic_in_its_file(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_check_disk", lambda plan: None)
    path, gpus = CONFIGS / "7b_long.yaml", 64
    real = load_config(path)
    data = [f"data.train={corpus.train}", "data.val=null", "data.seq_len=8"]
    plan = plans.make_plan(load_config(path, [f"tokenizer={corpus.tokenizer}", *data, f"out={tmp_path}"]), gpus)
    size, tokens = plan.model_config, real.data.micro_batch_size * real.data.seq_len // real.parallel.sequence
    hidden, mlp = size.hidden_size, size.intermediate_size
    key_value = hidden // size.num_attention_heads * size.num_key_value_heads
    expected = {
        "weights, gradients, masters, moments": states_of(plan).device_bytes,
        "what `selective` keeps": 2 * tokens * size.num_hidden_layers * (5 * hidden + 2 * key_value + 2 * mlp),
        "one block computed again in backward": tokens * (24 * hidden + 8 * mlp),
        "one exchange, sent and received": 2 * 2 * tokens * (hidden + 2 * key_value),
        "loss": 6 * size.vocab_size * hidden + 20 * (1 << 27),
        "gathered weights": 2e9,
    }
    expected["together"] = sum(expected.values())
    stated = dict(re.findall(r"^#   (\S.*?)  .* ([\d.]+)$", path.read_text(), re.MULTILINE))
    assert {name: float(figure) for name, figure in stated.items()} == {
        name: pytest.approx(value / 1e9, abs=0.06) for name, value in expected.items()
    }


def memory_in_documentation(name: str, gpus: int, deepspeed: str) -> list[float]:
    """Return the figures of a row: states, activations, loss and sum, in GB."""
    page = (CONFIGS.parent / "docs/performance.md").read_text()
    run = re.escape(name) if name == "7b_tvr" else re.escape(name.split("_")[0]) + r"_\*"
    row = re.search(rf"^\| `{run}`, {gpus} \| `{deepspeed}` \|(.*)$", page, re.MULTILINE)
    assert row is not None
    return [float(cell) for cell in row[1].split("|")[:4]]


def column_of_table(path: Path, column: int) -> str:
    """Return the row of the README's table about a run file."""
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


def initial_deviations(config: Config) -> tuple[Config, dict[str, float]]:
    """Return the run with bound methods, and the standard deviation of each weight of its model."""
    model_config = hf_config(config, TinyTokenizer(config.model.hf_fields["vocab_size"]))
    bound = bind_methods(config, model_config)
    weights = outline(bound, model_config)
    return bound, {weight.name: initial_rule(weight, bound, 0.02)[0].std for weight in weights}


@pytest.mark.parametrize("path", sorted((CONFIGS / "papers").glob("oec_*.yaml")), ids=of)
def test_the_centering_runs_start_as_the_papers_code(path: Path) -> None:
    """nanoGPT's modules: nn.Linear by `xavier_normal_` with a fused c_attn of 3d outputs, N(0, 1/d) for the embedding."""
    config = load_config(path)
    d, mlp, layers = (config.model.hf_fields[f] for f in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    _, found = initial_deviations(config)
    block = f"model.layers.{layers - 1}."
    expected = {
        "model.embed_tokens.weight": sqrt(1 / d),
        **{f"{block}self_attn.{role}_proj.weight": sqrt(2 / (d + 3 * d)) for role in "qkv"},
        f"{block}self_attn.o_proj.weight": 0.02 / sqrt(2 * layers),
        **{f"{block}mlp.{role}_proj.weight": sqrt(2 / (d + mlp)) for role in ("gate", "up", "down")},
        "lm_head.weight": sqrt(2 / (d + 50304)),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "lr", "tokens", "warmup"), [("rapid", 1e-3, 1.05e6, 100), ("stable", 5e-4, 4.2e6, 2000)]
)
def test_the_baselines_of_wesar_are_the_papers(name: str, lr: float, tokens: float, warmup: int) -> None:
    """arXiv 2410.05052: d 2048, 24 blocks of 16 heads, Small initialization, and an embedding that starts at deviation 1."""
    config = load_config(CONFIGS / f"papers/wesar_small_{name}.yaml")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert [config.model.hf_fields[size] for size in sizes] == [2048, 24, 16, 32000]
    assert (config.optim.lr, config.optim.schedule.warmup_steps) == (lr, warmup)
    assert config.tokens_per_step == pytest.approx(tokens, rel=0.01)
    assert config.total_steps * config.tokens_per_step == pytest.approx(30e9, rel=1e-3)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.grad_clip) == ((0.9, 0.95), 0.01, 1.0)
    bound, found = initial_deviations(config)
    small, scale, z_loss = bound.methods
    assert (small.name, scale.name, z_loss.coefficient) == ("small_init", "embedding_scale", 1e-4)
    embedding = bound.methods[0].run.matrices["model.embed_tokens"]
    assert found[embedding.name] == found["lm_head.weight"] == pytest.approx(0.01398, abs=5e-6)
    assert found["model.layers.3.mlp.down_proj.weight"] == pytest.approx(0.01398 / sqrt(48), rel=1e-3)
    assert scale.forward_factor(embedding) == pytest.approx(sqrt(5 * 2048 / 2))
