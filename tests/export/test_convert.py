"""Conversion of real checkpoints: every sharding that DeepSpeed writes, the proof, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM, pipeline

from pretrain.checkpoints.logit_probe import load_probe, probe_logits, probe_positions
from pretrain.checkpoints.stored import master_weights
from pretrain.errors import UserError
from pretrain.export import convert as conversion
from pretrain.export import safetensors_files as writing
from pretrain.export.convert import convert
from pretrain.export.proof import NotEqualError, computing_in
from pretrain.files import checksum
from pretrain.methods.lir import LIR
from pretrain.methods.tvr import TVR
from pretrain.model import evenkeel_llama
from pretrain.sharded import Moments
from tests.support.runs import launch, open_process, run_ranks, wait_for

# No dimension divides by 3 ranks, and few by 2: every kind of padding occurs.
LLAMA = {
    "family": "llama",
    "hidden_size": 44,
    "intermediate_size": 91,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TIED_LLAMA = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {"family": "gpt2", "n_embd": 35, "n_layer": 2, "n_head": 1, "tie_word_embeddings": True}
BF16 = {"bf16": {"enabled": True}}


@dataclass(frozen=True)
class Sharding:
    """The settings of a checkpoint: ranks, the model, DeepSpeed's JSON, and methods if not those of the tiny run."""

    ranks: int
    model: dict
    deepspeed: dict
    methods: tuple[dict, ...] | None = None


SHARDINGS = {
    "zero3_small_sub_groups": Sharding(3, LLAMA, {"zero_optimization": {"stage": 3, "sub_group_size": 3000}}),
    "zero2_round_robin": Sharding(2, GPT2, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    "zero1_bf16": Sharding(2, TIED_LLAMA, {**BF16, "zero_optimization": {"stage": 1}}),
    "stage0": Sharding(1, TIED_LLAMA, {"zero_optimization": {"stage": 0}}),
}
MORE_SHARDINGS = {
    "zero1": Sharding(3, LLAMA, {"zero_optimization": {"stage": 1}}),
    "zero1_bf16_3_ranks": Sharding(3, GPT2, {**BF16, "zero_optimization": {"stage": 1}}),
    "zero2_bf16_aligned": Sharding(3, GPT2, {**BF16, "zero_optimization": {"stage": 2, "parameter_alignment": True}}),
    "stage0_bf16": Sharding(
        2, TIED_LLAMA, {**BF16, "zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}}
    ),
    "zero3_one_rank": Sharding(1, TIED_LLAMA, {"zero_optimization": {"stage": 3}}),
    "zero3_tied_gpt2": Sharding(2, GPT2, {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}),
    "zero3_bf16_offload": Sharding(
        2,
        LLAMA,
        {
            **BF16,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "offload_optimizer": {"device": "cpu"},
            },
        },
    ),
}
# A model that no stock class can hold.
OWN_CLASS = Sharding(
    2,
    TIED_LLAMA,
    {**BF16, "zero_optimization": {"stage": 3}},
    methods=({"name": "wesar"}, {"name": "seednorm"}, {"name": "attention_residuals", "blocks": 3}),
)
ALL_SHARDINGS = {**SHARDINGS, **MORE_SHARDINGS, "own_class": OWN_CLASS}
EVERY = [*SHARDINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_SHARDINGS)]
STOCK = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}


@pytest.fixture(scope="module")
def checkpoint_of(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function to the checkpoint of two steps under a sharding, made on first use. Copy it before you damage it."""
    out = tmp_path_factory.mktemp("runs")
    template = yaml.safe_load(run_file.read_text(encoding="utf-8"))
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            sharding = ALL_SHARDINGS[name]
            data = {**template["data"], "global_batch_size": 2 * sharding.ranks}
            content = {"name": name, "out": str(out), "steps": 2, "model": sharding.model, "data": data}
            if sharding.methods is not None:
                content["methods"] = list(sharding.methods)
            path = out / f"{name}.yaml"
            path.write_text(yaml.safe_dump({**template, **content, "deepspeed": sharding.deepspeed}))
            assert run_ranks(["--config", str(path)], out / f"{name}_logs", sharding.ranks).code == 0
            made[name] = out / name / "checkpoints/step_00000002"
        return made[name]

    return make


@pytest.fixture(scope="module")
def fp32_checkpoint(checkpoint_of) -> Path:
    return checkpoint_of("zero3_small_sub_groups")


@pytest.fixture(scope="module")
def exported(fp32_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert `fp32_checkpoint` by the command line, named by its `latest` file."""
    out = tmp_path_factory.mktemp("hf") / "model"
    ended = command_line(fp32_checkpoint.parent / "latest", out)
    assert ended.code == 0, ended.stderr
    assert "largest |difference| " in ended.stdout
    assert "largest |logit| " in ended.stdout
    assert "class: LlamaForCausalLM (stock transformers)\n  nothing to fold: the weights are plain\n" in ended.stdout
    assert ended.stderr == ""
    return out


@pytest.fixture
def copied(fp32_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a checkpoint to damage."""
    return Path(shutil.copytree(fp32_checkpoint, tmp_path / "step_00000002"))


def command_line(checkpoint: Path, out: Path, *flags: str, variables: dict[str, str] | None = None):
    words = ["tools/convert_to_hf.py", "--checkpoint", str(checkpoint), "--out", str(out), *flags]
    return launch([sys.executable, *words], variables)


def deepspeed_says(checkpoint: Path) -> tuple[dict[str, torch.Tensor], torch.dtype]:
    """Return the weights by DeepSpeed's own reader if it can read them, else the working copies; and their precision."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = torch.load(next((checkpoint / "deepspeed").glob("*mp_rank_00_model_states.pt")), weights_only=False)
    zero = state["ds_config"]["zero_optimization"]["stage"]
    if zero == 0 or (zero == 1 and state["ds_config"]["bf16"]["enabled"]):  # it refuses both
        weights = state["module"]
        return weights, next(iter(weights.values())).dtype
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed"), torch.float32


def change(
    checkpoint: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor], *, also_moments: bool = True
) -> None:
    """Replace one master weight in the checkpoint's files, and make the manifest agree.

    With `also_moments` the trainer's moments agree too, so that only its logits differ.
    """
    stored = master_weights(checkpoint / "deepspeed")[name]
    values = new(stored())
    rest = values.flatten()
    spans = [part.span for part in stored.parts]
    for span in spans:
        with open(span.file, "r+b") as file:
            file.seek(span.offset)
            file.write(rest[: span.count].numpy())
        rest = rest[span.count :]
    changed = {span.file for span in spans}
    if also_moments:
        path = checkpoint / "moments.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: asdict(Moments.of(values))}))
        changed.add(path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in changed:
        entry = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        manifest["files"][str(file.relative_to(checkpoint))] = entry
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def visible(folder: Path) -> list[str]:
    """Return the names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


# Reading


@pytest.mark.parametrize("name", EVERY)
def test_every_master_is_what_deepspeed_itself_reads(name: str, checkpoint_of) -> None:
    found = master_weights(checkpoint_of(name) / "deepspeed")
    expected, precision = deepspeed_says(checkpoint_of(name))
    tied = {"lm_head.weight"} if ALL_SHARDINGS[name].model.get("tie_word_embeddings") else set()
    assert found.keys() == expected.keys() - tied
    for weight, read in found.items():
        assert read().dtype == torch.float32
        assert torch.equal(read().to(precision), expected[weight]), weight


@pytest.mark.parametrize("name", EVERY)
def test_every_sharding_converts_and_is_proved_equal(name: str, checkpoint_of, tmp_path: Path) -> None:
    sharding = ALL_SHARDINGS[name]
    made = convert(checkpoint_of(name), tmp_path / "hf")
    assert made.dtype == (torch.bfloat16 if "bf16" in sharding.deepspeed else torch.float32)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model) is STOCK[sharding.model["family"]]
    assert not any(loading.values()), loading
    assert model.dtype == made.dtype
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    # Same machine, same threads, same kernels: not even rounding differs.
    input_ids, trained = load_probe(checkpoint_of(name))
    assert trained.dtype == made.dtype
    torch.testing.assert_close(probe_logits(model, input_ids), trained, rtol=0, atol=2e-6 * float(trained.abs().max()))


def test_weights_are_read_one_at_a_time(fp32_checkpoint: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref] = []

    def watched(read):
        def load() -> torch.Tensor:
            assert all(weight() is None for weight in alive), "another weight is still in memory"
            weight = read()
            alive.append(weakref.ref(weight))
            return weight

        return load

    stored = master_weights(fp32_checkpoint / "deepspeed")
    tensors = {name: watched(weight) for name, weight in stored.items()}
    writing.write_weights(tmp_path, tensors, {name: weight.shape for name, weight in stored.items()}, torch.float32)
    assert len(alive) == len(stored)


# The folder


def test_the_folder_is_a_stock_model_with_nothing_of_the_trainer(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer("the weight of a layer", add_special_tokens=False)["input_ids"]).strip() == (
        "the weight of a layer"
    )
    card = (exported / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["evenkeel", "llama", "lir", "tvr"]
    assert "2 of 2 steps, 384 tokens" in card
    assert "target_std: 0.01" in card
    assert "- `tvr`: the weights are plain, nothing had to be changed" in card


def test_a_pipeline_loads_the_folder_as_it_is(exported: Path) -> None:
    [made] = pipeline("text-generation", model=str(exported))("the weight", max_new_tokens=4, do_sample=False)
    assert made["generated_text"].startswith("the weight")


def test_greedy_generation_survives_saving_and_loading(exported: Path, tmp_path: Path) -> None:
    def generate(folder: Path) -> list[int]:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("the", return_tensors="pt")
        return model.generate(**prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0].tolist()

    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    first = generate(exported)
    assert len(first) >= 64
    assert generate(tmp_path) == first


def test_weights_are_shared_out_over_files_that_the_index_names(
    fp32_checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 40_000)  # the embedding is larger, most weights are smaller
    made = convert(fp32_checkpoint, tmp_path / "hf")
    assert made.model.files > 3
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"model-{i:05}-of-{made.model.files:05}.safetensors" for i in range(1, made.model.files + 1)
    }
    held = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "hf" / file, "pt") as shard:
            names = set(shard.keys())
            sizes = [shard.get_tensor(name).nbytes for name in names]
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(sizes) <= 40_000 or len(sizes) == 1
        held += sum(sizes)
    assert held == index["metadata"]["total_size"]
    one, many = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (exported, tmp_path / "hf"))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["zero3_small_sub_groups", "zero1_bf16"])
def test_any_precision_can_be_asked_for(name: str, dtype: torch.dtype, checkpoint_of, tmp_path: Path) -> None:
    convert(checkpoint_of(name), tmp_path / "hf", dtype)
    masters = master_weights(checkpoint_of(name) / "deepspeed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for weight, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[weight]().to(dtype)), weight


# The proof


@pytest.mark.parametrize(
    "weight",
    [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.input_layernorm",
        "model.norm",
        "lm_head",
    ],
)
def test_one_weight_off_by_a_percent_fails_the_proof(weight: str, copied: Path, tmp_path: Path) -> None:
    change(copied, f"{weight}.weight", lambda values: values * 1.01)
    with pytest.raises(NotEqualError, match="does not give the trainer's logits"):
        convert(copied, tmp_path / "hf")
    assert visible(tmp_path) == [copied.name]


@pytest.mark.parametrize("precision", ["zero3_small_sub_groups", "zero1_bf16"])
def test_a_weight_that_is_not_the_trainers_is_named_in_any_precision(
    precision: str, checkpoint_of, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(checkpoint_of(precision), tmp_path / "step_00000002"))
    name = next(name for name in master_weights(copied / "deepspeed") if "q_proj" in name or "c_attn.weight" in name)
    change(copied, name, lambda values: values * (1 + 1e-6), also_moments=False)
    with pytest.raises(NotEqualError, match=re.escape(name)):
        convert(copied, tmp_path / "hf")
    assert visible(tmp_path) == [copied.name]


def test_a_failed_proof_exits_with_1_and_leaves_nothing(copied: Path, tmp_path: Path) -> None:
    change(copied, "model.norm.weight", lambda values: values * 1.01)
    ended = command_line(copied, tmp_path / "hf")
    assert ended.code == 1
    assert "does not give the trainer's logits" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert visible(tmp_path) == [copied.name]


@pytest.mark.parametrize(
    "new", [lambda values: values * 1.02, lambda values: values.flatten().roll(1).view_as(values)], ids=["2%", "shift"]
)
def test_the_proof_in_bf16_sees_a_wrong_vocabulary_matrix(new, checkpoint_of, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint_of("zero1_bf16"), tmp_path / "step_00000002"))
    change(copied, "model.embed_tokens.weight", new)
    with pytest.raises(NotEqualError):
        convert(copied, tmp_path / "hf")


def test_a_model_that_has_diverged_is_refused_by_the_name_of_the_weight(copied: Path, tmp_path: Path) -> None:
    change(copied, "model.norm.weight", lambda values: values * float("nan"))
    with pytest.raises(UserError, match=r"NaN or infinity in model\.norm\.weight"):
        convert(copied, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_round_robin"])
def test_lifting_one_module_at_a_time_computes_as_the_whole_model_in_that_precision(
    name: str, checkpoint_of, tmp_path: Path
) -> None:
    convert(checkpoint_of(name), tmp_path / "hf", torch.bfloat16)
    input_ids, _ = load_probe(checkpoint_of(name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with computing_in(torch.float32, model):
        lifted = probe_logits(model, input_ids)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(lifted, probe_logits(model.float(), input_ids))


# Methods that fold


def test_a_method_folds_the_weights_before_they_are_written(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint holds half of one weight, as a method that trains w = 2 v would leave it."""
    name = "model.layers.0.mlp.down_proj.weight"
    change(copied, name, lambda values: values / 2)
    with pytest.raises(NotEqualError):
        convert(copied, tmp_path / "unfolded")

    def fold(self, tensors, hf_config):
        half = tensors[name]
        tensors[name] = lambda: half() * 2
        return hf_config

    monkeypatch.setattr(LIR, "fold", fold)
    assert convert(copied, tmp_path / "folded").proof.holds


def test_methods_fold_by_their_fold_order_and_then_as_listed(
    fp32_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for method in (LIR, TVR):
        monkeypatch.setattr(method, "fold", lambda self, tensors, hf_config: done.append(self.name) or hf_config)
    convert(fp32_checkpoint, tmp_path / "as_listed")
    monkeypatch.setattr(LIR, "fold_order", 3)
    convert(fp32_checkpoint, tmp_path / "lir_last")
    assert done == ["lir", "tvr", "tvr", "lir"]


def test_a_fold_gets_the_weights_as_forward_saw_them(
    checkpoint_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are float32, rounded like the working copies: forward computed with rounded weights."""
    checkpoint, seen = checkpoint_of("zero1_bf16"), {}

    def fold(self, tensors, hf_config):
        seen.update({name: load() for name, load in tensors.items()})
        return hf_config

    monkeypatch.setattr(LIR, "fold", fold)
    convert(checkpoint, tmp_path / "hf")
    masters = master_weights(checkpoint / "deepspeed")
    assert seen.keys() == masters.keys()
    for name, weight in seen.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, masters[name]().bfloat16().float()), name


# Models that no stock class can hold


@pytest.fixture(scope="module")
def own_class(checkpoint_of, tmp_path_factory: pytest.TempPathFactory):
    """Return (checkpoint, folder, output of the command line), converted where no cache can be written."""
    out = tmp_path_factory.mktemp("hf") / "model"
    ended = command_line(checkpoint_of("own_class"), out, variables={"HF_HOME": "/dev/null/nowhere"})
    assert ended.code == 0, ended.stderr
    return checkpoint_of("own_class"), out, ended.stdout


def test_the_command_line_and_the_card_say_which_class_and_why(own_class) -> None:
    _, folder, output = own_class
    assert "class: EvenkeelLlamaForCausalLM (its own, no stock class holds it: trust_remote_code=True)" in output
    card = (folder / "README.md").read_text()
    for line in ("seednorm: no stock class has norms", "wesar: each matrix is multiplied by its factor"):
        assert line in output
        assert line.partition(": ")[2] in card
    assert 'model="PATH_OR_NAME_OF_THIS_FOLDER", trust_remote_code=True)' in card
    assert "__pycache__" not in visible(folder)  # the proof ran the file where it lies
    assert "stock EvenkeelLlamaForCausalLM" not in card


def test_the_folder_loads_where_evenkeel_is_not_installed(own_class, tmp_path: Path) -> None:
    checkpoint, folder, _ = own_class
    program = """
import sys
sys.modules["pretrain"] = None  # importing it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, probe, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = load_file(probe)["input_ids"]
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
tokens = model.generate(ids[:1, :5], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
assert tokens.shape == (1, 13)
model.save_pretrained(out)
save_file({"logits": logits}, out + "/logits.safetensors")
print(type(model).__module__)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert torch.equal(again(ids, use_cache=False).logits, logits)
"""
    words = [sys.executable, "-c", program, str(folder), str(checkpoint / "probe.safetensors"), str(tmp_path / "again")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("transformers_modules."), ended.stdout
    input_ids, trained = load_probe(checkpoint)
    found = load_file(tmp_path / "again/logits.safetensors")["logits"][:, probe_positions(input_ids.shape[1])]
    scale = float(trained.abs().max())
    torch.testing.assert_close(found, trained, rtol=0, atol=2e-2 * scale)  # bf16, and a tied head's factor folded
    assert (tmp_path / "again/modeling_evenkeel.py").exists()


def test_the_proof_runs_the_exported_file_and_not_the_trainers_class(
    own_class, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / evenkeel_llama.MODELING_FILE.name
    wrong.write_text(evenkeel_llama.MODELING_FILE.read_text().replace(".softmax(0)", ".sigmoid()"))
    monkeypatch.setattr(evenkeel_llama, "MODELING_FILE", wrong)
    with pytest.raises(NotEqualError):
        convert(own_class[0], tmp_path / "hf")
    assert visible(tmp_path) == [wrong.name]


def test_a_weight_that_no_stock_model_has_is_an_error(
    fp32_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LIR,
        "fold",
        lambda self, tensors, hf_config: tensors.update({"model.gate": lambda: torch.zeros(1)}) or hf_config,
    )
    with pytest.raises(RuntimeError, match=re.escape("it lacks ['model.gate']")):
        convert(fp32_checkpoint, tmp_path / "hf")
    assert visible(tmp_path) == []


# Refusals


def _remove(checkpoint: Path) -> Path:
    file = sorted((checkpoint / "deepspeed").glob("*optim_states.pt"))[1]
    file.unlink()
    return file


def _truncate(checkpoint: Path) -> Path:
    file = sorted((checkpoint / "deepspeed").glob("*optim_states.pt"))[2]
    file.write_bytes(file.read_bytes()[:-100])
    return file


def _flip(checkpoint: Path) -> Path:
    file = checkpoint / "probe.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_a_damaged_checkpoint_is_refused_by_the_file_at_fault(damage, copied: Path, tmp_path: Path) -> None:
    file = damage(copied)
    with pytest.raises(UserError, match=re.escape(str(file))):
        convert(copied, tmp_path / "hf")
    assert visible(tmp_path) == [copied.name]


def test_what_is_no_checkpoint_is_refused_with_exit_code_2(fp32_checkpoint: Path, tmp_path: Path) -> None:
    ended = command_line(fp32_checkpoint / "deepspeed", tmp_path / "hf")
    assert ended.code == 2
    assert "is not a complete checkpoint" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert visible(tmp_path) == []


def test_an_existing_folder_is_left_as_it_is(fp32_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(fp32_checkpoint, tmp_path / "hf")
    assert visible(tmp_path / "hf") == ["precious.txt"]


def test_a_folder_that_cannot_be_made_is_refused(fp32_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot convert .*file.hf: "):
        convert(fp32_checkpoint, tmp_path / "file/hf")


def test_a_conversion_that_breaks_off_leaves_nothing(
    fp32_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(fp32_checkpoint, tmp_path / "hf")
    assert visible(tmp_path) == []


# The tool as it is, except that it waits for its signal once the model is written.
WAITS_BEFORE_ITS_PROOF = """
import runpy, sys, time
from pretrain.export import convert
convert.prove = lambda *_, **__: time.sleep(600)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_conversion_that_gets_a_signal_leaves_nothing_and_may_start_again(
    fp32_checkpoint: Path, tmp_path: Path
) -> None:
    command = ["tools/convert_to_hf.py", "--checkpoint", str(fp32_checkpoint), "--out"]
    waiting = [sys.executable, "-c", WAITS_BEFORE_ITS_PROOF, *command]
    started = {
        number: open_process([*waiting, str(tmp_path / number.name)]) for number in (signal.SIGHUP, signal.SIGTERM)
    }
    for number, process in started.items():
        while not list(tmp_path.glob(f".{number.name}.*/model")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
    for number, process in started.items():
        ended = wait_for([process])
        assert ended.code == 128 + number
        assert ended.stderr.endswith(f"stopped by {number.name}\n")
        assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
    assert launch([sys.executable, *command, str(tmp_path / "hf")]).code == 0


def test_files_of_another_checkpoint_among_the_shards_are_noticed(copied: Path) -> None:
    """The reader itself counts the ranks, below the check of the manifest."""
    _remove(copied)
    with pytest.raises(UserError, match="written by 3 ranks but holds the optimizer states of 2"):
        master_weights(copied / "deepspeed")
