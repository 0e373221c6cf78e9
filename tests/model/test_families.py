"""The records of the model families against the classes of transformers that they describe."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pretrain.model.attention import CAUSAL, choose_attention
from pretrain.model.class_logits import require_known_logits
from pretrain.model.families import FAMILIES
from pretrain.model.layout import blocks_of, describe_model
from pretrain.model.loss import loss_head, with_loss_head
from tests.support.corpus import tiny
from tests.support.runs import PATIENCE_S, REPOSITORY

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def built(name: str, **more: object) -> PreTrainedModel:
    family = FAMILIES[name]
    aliases = family.config_class.attribute_map
    fields = {aliases.get(key, key): value for key, value in SIZES.items()} | more
    hf_config = family.config_class(**{**family.defaults(fields), **fields})
    with torch.device("meta"):
        return with_loss_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)])(hf_config)


@every_family
def test_the_record_names_every_module_with_weights_and_no_other(name):
    family, model = FAMILIES[name], built(name)
    assert type(model).__name__ == family.trained_class
    assert len(blocks_of(model)) == 2
    assert {weight.layer for weight in describe_model(model)} == {None, 1, 2}
    modules = {weight.rpartition(".")[0] for weight, _ in model.named_parameters()} | {"lm_head"}
    block = f"{family.blocks}.0."
    assert {module.removeprefix(block) for module in modules if module.startswith(block)} == family.in_block.keys()
    assert {module for module in modules if not module.startswith(family.blocks)} == family.outside.keys()
    assert family.in_block.keys() >= set(family.norms)
    assert family.outside[family.final_norm] == "norm"


@every_family
def test_what_a_family_is_said_to_have_is_there(name):
    family, model = FAMILIES[name], built(name)
    norms = [module for role, module in roles(model) if role == "norm"]
    assert ("rms_norm" in family.has) == all(hasattr(norm, "variance_epsilon") for norm in norms)
    assert ("pre_norm" in family.has) == (len(family.norms) == 2)
    require_known_logits(model, loss_head(model).after_head)


def roles(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    return [(weight.role, model.get_submodule(weight.name.rpartition(".")[0])) for weight in describe_model(model)]


@pytest.mark.parametrize(
    ("name", "more", "masked"),
    [
        ("mistral", {}, False),
        ("mistral", {"sliding_window": 8}, True),
        ("mistral", {"sliding_window": 32}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, False),
        ("qwen3", {"sliding_window": 8}, False),
    ],
)
def test_a_window_that_hides_tokens_keeps_transformers_mask(name, more, masked):
    """Attention without a mask would see all of them."""
    model = built(name, **more)
    choose_attention(model, documents=False)
    assert (model.config._attn_implementation != CAUSAL) == masked


def test_a_window_is_seen_in_training():
    torch.manual_seed(0)
    model = built("mistral", sliding_window=4).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(model.config).inv_freq
    choose_attention(model, documents=False)
    ids = torch.randint(0, 50, (1, 12))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 50
    with torch.no_grad():
        before, after = (model(each, use_cache=False).logits[0] for each in (ids, changed))
    # Two layers with windows of 4 tokens see 6 tokens back.
    assert not torch.equal(before[6], after[6])
    assert torch.equal(before[7:], after[7:])


@pytest.mark.slow
def test_the_documented_family_is_added_by_its_file_alone(corpus, tmp_path):
    """The file of docs/families.md, in a copy of the package: it is planned, and takes a step."""
    page = (REPOSITORY / "docs/families.md").read_text(encoding="utf-8")
    source = page.split("```python\n")[1].split("```")[0]
    shutil.copytree(REPOSITORY / "pretrain", tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pretrain/model/families/smollm3.py").write_text(source, encoding="utf-8")
    stage = {"zero_optimization": {"stage": 1}}
    content = tiny(corpus) | {"out": str(tmp_path / "runs"), "steps": 2, "deepspeed": stage}
    content["model"] = {**SIZES, "family": "smollm3", "vocab_size": None, "max_position_embeddings": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "pretrain/train.py"), "--config", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "smollm3, " in ended.stdout + ended.stderr
