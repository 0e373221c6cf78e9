"""The config.json of exports: transformers 4 and 5, and tools that read the fields of one of them, build the same model.

transformers 5 keeps RoPE in `rope_parameters`. Older readers read `rope_theta` and `rope_scaling`, and silently compute
with a theta of 10,000 where these are missing. Version 5 reads both, so both are written. GPT-2's `n_ctx`, which later
versions call `n_positions`, is read by llama.cpp's converter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrain.files import write_text


def save_config(hf_config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json into `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config_fields(hf_config), indent=2, sort_keys=True) + "\n")


def config_fields(hf_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of config.json: the fields of `hf_config` under their present names and under older ones."""
    fields = json.loads(hf_config.to_json_string())
    older = {"torch_dtype": fields["dtype"]} if fields.get("dtype") else {}
    if "n_positions" in fields:
        older["n_ctx"] = fields["n_positions"]
    return fields | older | _rope(hf_config, fields.get("rope_parameters") or {})


def _rope(hf_config: PreTrainedConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's fields in both forms.

    Empty where there is no RoPE, and where each kind of layer has its own, for which every older class has other names.
    """
    if "rope_theta" not in parameters:
        return {}
    parameters = {key: value for key, value in parameters.items() if key != "type"}  # a file's own older form
    beside: dict[str, Any] = {
        key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters
    }
    kind = parameters["rope_type"]
    if kind == "default":
        return {"rope_parameters": parameters, **beside, "rope_scaling": None}
    scaling = {key: value for key, value in parameters.items() if key not in beside} | {"type": kind}
    if kind in ("yarn", "longrope"):  # version 4 derives these two in another way, or not at all
        original = parameters["original_max_position_embeddings"]
        scaling["factor"] = scaling.get("factor") or hf_config.max_position_embeddings / original
        scaling["attention_factor"] = float(ROPE_INIT_FUNCTIONS[kind](hf_config, "cpu")[1])
    if kind == "longrope":
        beside["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return {"rope_parameters": parameters, **beside, "rope_scaling": scaling}
