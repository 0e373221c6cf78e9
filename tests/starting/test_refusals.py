"""Models that a run cannot start from, each refused with a sentence that names the file or the key at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.methods import REGISTRY
from pretrain.starting import model_of
from pretrain.trainer.plan import Plan, make_plan
from tests.support.corpus import Corpus, tiny
from tests.support.stock_models import saved, stock_model

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def sound(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a llama with the tokenizer of the corpus, in one file."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    model = stock_model("llama", vocab_size=320, attention_bias=False, mlp_bias=False, max_position_embeddings=64)
    model.save_pretrained(folder)
    shutil.copytree(corpus.tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def plan_of(corpus: Corpus, folder: Path | str, model: dict[str, Any] | None = None, **keys: Any) -> Plan:
    """Return the checked plan of a run that starts from `folder`."""
    content = tiny(corpus) | {"name": "run", "out": "runs", "methods": [], **keys}
    content["model"] = {"family": "llama", "init_from": str(folder), **(model or {})}
    plan = make_plan(Config.model_validate(content), world_size=1)
    assert plan.start is not None
    plan.start.check_files()
    return plan


def test_what_the_run_file_leaves_out_is_the_models(corpus: Corpus, sound: Path) -> None:
    plan = plan_of(corpus, sound)
    section = plan.config.model.hf_fields
    assert (section["hidden_size"], section["rms_norm_eps"]) == (24, 3e-5)
    assert plan.model_config.rope_parameters["rope_theta"] == 500.0
    assert plan.model_config.vocab_size == 320
    assert plan.start is not None
    assert plan.start.notes == ()
    again = Config.model_validate_json(plan.config.model_dump_json())
    assert model_of(again).model == plan.config.model


def test_what_the_run_file_changes_is_said(corpus: Corpus, sound: Path) -> None:
    plan = plan_of(corpus, sound, {"rms_norm_eps": 1e-6, "rope_theta": 1000.0})
    assert "model.rms_norm_eps is 1e-06 instead of 3e-05" in str(plan.start)
    assert "model.rope_parameters is {'rope_type': 'default', 'rope_theta': 1000.0} instead of" in str(plan.start)


def test_another_kind_of_rotary_positions_keeps_the_models_theta(corpus: Corpus, sound: Path) -> None:
    plan = plan_of(corpus, sound, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    assert plan.model_config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


def test_a_folder_without_a_tokenizer_is_taken_and_says_so(corpus: Corpus, model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    assert "no tokenizer lies with them" in str(plan_of(corpus, model).start)


def test_a_file_of_the_base_model_and_tables_of_older_files_are_read(corpus: Corpus, model: Path) -> None:
    tensors = load_file(model / FILE)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}, model / FILE)
    assert plan_of(corpus, model).start is not None


def test_options_that_loaded_weights_overrule_are_said(corpus: Corpus, sound: Path) -> None:
    plan = plan_of(corpus, sound, methods=[{"name": "wesar", "backbone": "small"}])
    assert "the initial values of wesar follow from them, not from its options" in str(plan.start)


def test_gpt2_as_the_hub_has_it_is_read(corpus: Corpus, tmp_path: Path) -> None:
    """Its file names no `transformer.`, holds the tables of the causal mask, and no head."""
    model = stock_model("gpt2", vocab_size=320)
    model.config.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    tables = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
    save_file({name: value.contiguous() for name, value in (tensors | tables).items()}, tmp_path / FILE)
    plan = plan_of(corpus, tmp_path, {"family": "gpt2"})
    assert plan.start is not None
    found = plan.start.tensors()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name](), parameter), name


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | fields))

    return change


def cut_off(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8])


def pickled(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")


def header(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text) and None


def index_of_nothing(folder: Path) -> None:
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere"}}))


def other_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight missing": (without(Q), f"holds no {Q}"),
    "a weight too many": (
        lambda f: edit(f, lambda t: t.update(extra=torch.zeros(2))),
        "holds model.extra, which the run",
    ),
    "a bias too many": (
        lambda f: edit(f, lambda t: t.update({Q.replace("weight", "bias"): torch.zeros(24)})),
        "model.attention_bias and model.mlp_bias",
    ),
    "another shape": (lambda f: edit(f, lambda t: t.update({Q: torch.zeros(24, 25)})), rf"{Q} of shape \[24, 25\]"),
    "double precision": (lambda f: edit(f, lambda t: t.update({Q: torch.zeros(24, 24).double()})), f"{Q} as F64"),
    "cut off": (cut_off, "it is not whole"),
    "an empty file": (lambda f: (f / FILE).write_bytes(b""), "ends within its header"),
    "a header that is none": (header(b"nonsense"), f"cannot read .*{FILE}"),
    "a header that says too little": (header(b'{"a": {"dtype": "F32"}}'), "does not say where a lies"),
    "a weight beyond the end": (
        header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "ends before a",
    ),
    "an index that leads elsewhere": (index_of_nothing, "does not say which file"),
    "pickles": (pickled, r"pytorch_model.bin, which may run code"),
    "no weights": (lambda f: (f / FILE).unlink(), f"holds neither {FILE} nor"),
    "another family": (with_config(model_type="qwen3"), "is of a qwen3, and model.family is llama"),
    "our own class": (with_config(model_type="evenkeel_llama"), "start from that run's checkpoint instead"),
    "sizes that do not fit": (with_config(num_key_value_heads=3), "3 does not divide num_attention_heads 4"),
    "an activation that is unknown": (with_config(hidden_act="swigly"), "hidden_act: .*no such activation"),
    "other tokens": (other_tokens, r"token 31\d is .* so its row of the embedding"),
    "fewer tokens": (with_config(vocab_size=300), "vocab_size 300 is smaller than the 320 tokens .* trained with"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "neither a Hugging Face folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_is_refused(corpus: Corpus, model: Path, fault: str) -> None:
    damage, expected = FAULTS[fault]
    damage(model)
    with pytest.raises(UserError, match=f"(?s){expected}") as caught:
        plan_of(corpus, model)
    assert str(model) in str(caught.value) or "model." in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_hidden_layers": 6}, "has 3 blocks. Say which of them"),
        (
            {"intermediate_size": 40},
            r"gate_proj.weight of shape \[38, 24\], and the run's .* has \[40, 24\]\. Leave model.intermediate_size",
        ),
        ({"vocab_size": 400}, r"embed_tokens.weight of shape \[320, 24\].*Leave model.vocab_size"),
        ({"tie_word_embeddings": True}, "holds lm_head.weight, which .*tie_word_embeddings"),
        ({"attention_bias": True}, "holds no model.layers.0.self_attn.*bias.*attention_bias"),
    ],
)
def test_keys_that_do_not_fit_the_model_are_refused(
    corpus: Corpus, sound: Path, keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){expected}"):
        plan_of(corpus, sound, keys)


@pytest.mark.parametrize(
    ("layers", "keys", "expected"),
    [
        ([0, 3], {}, "names block 3, and .* the blocks 0 to 2"),
        ([0, 1], {"num_hidden_layers": 3}, "lists 2 blocks, and model.num_hidden_layers is 3"),
    ],
)
def test_blocks_that_are_not_there_are_refused(
    corpus: Corpus, sound: Path, layers: list[int], keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        plan_of(corpus, sound, {"init_from": {"path": str(sound), "layers": layers}, **keys})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"methods": [{"name": "lir"}]}, "lir decides initial values and does nothing else"),
        ({"init": {"distribution": "uniform"}}, "has no effect, because model.init_from gives"),
        ({"init": {"std": {"embed": 1.0}}}, "has no effect, because model.init_from gives"),
        ({"warm_start": {"shrink": 1.0}}, "changes nothing"),
        ({"warm_start": {"shrink": 1.5}}, "less than or equal to 1"),
    ],
)
def test_keys_that_contradict_loaded_weights_are_refused(
    corpus: Corpus, sound: Path, keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        plan_of(corpus, sound, **keys)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "tvr", "relative_target": 0.5}, "tvr.relative_target reckons with the deviation"),
        ({"name": "tvr", "target_warmup_steps": 9}, "tvr.target_warmup_steps reckons with"),
        ({"name": "embedding_scale", "rule": "inverse_std"}, "Give embedding_scale.multiplier"),
        ({"name": "residual_scaling", "backbone": "he"}, "residual_scaling.backbone decides initial values"),
        ({"name": "qk_norm"}, "would serve another function"),
    ],
)
def test_methods_that_need_drawn_weights_are_refused(
    corpus: Corpus, sound: Path, method: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        plan_of(corpus, sound, methods=[method])


def test_shrinking_what_is_drawn_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValidationError, match=r"needs model\.init_from"):
        Config.model_validate({**tiny(corpus), "name": "run", "warm_start": {"shrink": 0.9}})


@pytest.mark.parametrize("path", ["https://example.org/model", "s3://bucket/model", "hf://a/b/c", "hf://"])
def test_a_place_that_holds_no_model_is_refused(corpus: Corpus, path: str) -> None:
    with pytest.raises(ValidationError, match="is no place of a model"):
        plan_of(corpus, path)


def test_a_folder_that_is_not_there_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        plan_of(corpus, tmp_path / "absent")


def test_a_run_folder_is_told_from_its_checkpoints(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step_00000001\n")
    with pytest.raises(UserError, match=r"is a run folder\. Give one of its checkpoints, such as"):
        plan_of(corpus, tmp_path)


def test_several_files_are_read_by_their_index(corpus: Corpus, tmp_path: Path) -> None:
    folder = saved(tmp_path / "parts", "llama", vocab_size=320, max_position_embeddings=64)
    plan_of(corpus, folder)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} cannot be read"):
        plan_of(corpus, folder)


def test_methods_whose_checkpoints_mean_something_with_them_only() -> None:
    """All others leave weights of which a stock class makes the same, as their references say: they have no fold."""
    assert {name for name, cls in REGISTRY.items() if not cls.leaves_weights_plain()} == {
        *("attention_residuals", "embedding_layernorm", "embedding_scale", "layernorm_scaling", "osp", "pre_ln"),
        *("qk_norm", "residual_scaling", "seednorm", "sigma_reparam", "softcap", "weight_norm", "wesar"),
    }
