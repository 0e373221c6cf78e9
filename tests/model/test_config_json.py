"""config.json: RoPE under the names of transformers 4 too, and the same logits by both versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import log, sqrt
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from pretrain.model.config_json import save_config
from pretrain.model.evenkeel_llama import bring_modeling_file, evenkeel_llama
from pretrain.model.modeling_evenkeel import EvenkeelLlamaForCausalLM

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
# By kind: the parameters of version 5, and `rope_scaling` of version 4 by its documentation. Version 4 would derive
# attention_factor in another way. It follows the papers' formulas: YaRN 0.1 ln(s) + 1, LongRoPE sqrt(1 + ln(s) /
# ln(original)).
KINDS = {
    "default": ({}, None),
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"factor": 2.0}, {"factor": 2.0}),
    "llama3": (LLAMA3, LLAMA3),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 32},
        {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.1 * log(4) + 1},
    ),
    "longrope": (LONGROPE, LONGROPE | {"factor": 4.0, "attention_factor": sqrt(1 + log(4) / log(32))}),
}


def rope(kind: str) -> dict:
    return {"rope_type": kind, "rope_theta": 500000.0, **KINDS[kind][0]}


def saved(hf_config: PreTrainedConfig, folder: Path) -> dict:
    save_config(hf_config, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_every_scaling_is_written_in_both_forms_and_stays_so(kind: str, tmp_path: Path) -> None:
    found = saved(LlamaConfig(**TINY, rope_parameters=rope(kind)), tmp_path)
    assert found["rope_parameters"].items() >= rope(kind).items()
    assert found["rope_theta"] == 500000.0
    if KINDS[kind][1] is None:
        assert found["rope_scaling"] is None
    else:
        scaling = found["rope_scaling"]
        assert scaling.pop("attention_factor", None) == pytest.approx(KINDS[kind][1].get("attention_factor"))
        named = {"type": kind, "rope_type": kind, **KINDS[kind][1]}
        assert scaling == {key: value for key, value in named.items() if key != "attention_factor"}
    assert found.get("original_max_position_embeddings") == (32 if kind == "longrope" else None)
    again = saved(AutoConfig.from_pretrained(tmp_path), tmp_path / "again")
    assert (again["rope_scaling"] or {}).items() >= (found["rope_scaling"] or {}).items()
    assert again["rope_parameters"].items() >= rope(kind).items()


def test_our_own_class_has_both_forms_and_gpt2_neither(tmp_path: Path) -> None:
    own = saved(evenkeel_llama(LlamaConfig(**TINY, rope_parameters=rope("linear")), seednorm=True), tmp_path)
    assert (own["rope_theta"], own["rope_scaling"]["factor"]) == (500000.0, 4.0)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=1)
    gpt2.dtype = torch.bfloat16
    found = saved(gpt2, tmp_path)
    assert not [key for key in found if "rope" in key]
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"


@pytest.mark.skipif("TF4" not in os.environ, reason="TF4 names no folder with transformers 4 (pip install --target)")
def test_transformers_4_computes_the_same_logits(tmp_path: Path) -> None:
    models = {kind: LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters=rope(kind))) for kind in KINDS}
    models["own"] = EvenkeelLlamaForCausalLM(
        evenkeel_llama(LlamaConfig(**TINY, rope_parameters=rope("yarn")), seednorm=True)
    )
    input_ids, expected = torch.arange(1, 97)[None], {}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        bring_modeling_file(model.config, tmp_path / name)
        save_config(model.config, tmp_path / name)
        with torch.no_grad():
            expected[name] = [model(input_ids[:, :length]).logits for length in (30, 96)]
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, __version__\nassert __version__ < '5'\n"
        "ids, found = torch.arange(1, 97)[None], {}\nfor name in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()\n"
        "    with torch.no_grad():\n        found[name] = [model(ids[:, :n]).logits for n in (30, 96)]\n"
        "torch.save(found, 'found.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.environ["TF4"], "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program, *models], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected)


def test_gpt2_has_its_context_under_the_older_name_too(tmp_path: Path) -> None:
    saved(GPT2Config(n_positions=96), tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert saved(again, tmp_path)["n_ctx"] == again.n_positions == 96
    again.n_positions = 48
    assert saved(again, tmp_path)["n_ctx"] == 48
    assert "n_ctx" not in saved(LlamaConfig(**TINY), tmp_path)
