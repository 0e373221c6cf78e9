"""The model class for what no class of transformers can hold; `modeling_evenkeel.py` is all of it and travels with exports.

Importing this makes transformers' Auto classes know it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pretrain.model import modeling_evenkeel
from pretrain.model.export_edits import as_config
from pretrain.model.modeling_evenkeel import EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM

MODELING_FILE = Path(modeling_evenkeel.__file__)

# Why no method that needs this class goes with softcap: as `conflicts` of a method has it.
UNLIKE_SOFTCAP = {
    "softcap": "capped logits are exported as a VaultGemma, which has stock norms and residuals; z_loss or mu_centering "
    "keep logits small without a cap"
}

AutoConfig.register(EvenkeelLlamaConfig.model_type, EvenkeelLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM, exist_ok=True)


def bring_modeling_file(hf_config: PreTrainedConfig, folder: Path) -> None:
    """Put the file that a model of `hf_config` needs into the exported `folder`, and say so in `hf_config`.

    A stock model needs none, whatever file `hf_config` came with the name of.
    """
    vars(hf_config).pop("auto_map", None)
    if isinstance(hf_config, EvenkeelLlamaConfig):
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        classes = {"AutoConfig": EvenkeelLlamaConfig, "AutoModelForCausalLM": EvenkeelLlamaForCausalLM}
        hf_config.auto_map = {auto: f"{MODELING_FILE.stem}.{cls.__name__}" for auto, cls in classes.items()}


def evenkeel_llama(hf_config: PreTrainedConfig, **parts: Any) -> EvenkeelLlamaConfig:
    """`hf_config`, of a LLaMA, a Qwen3 or this class already, with the given `parts`, its fields, besides what it has."""
    if not isinstance(hf_config, EvenkeelLlamaConfig):
        parts = {"qk_norm": hf_config.model_type == "qwen3", **parts}
    return as_config(EvenkeelLlamaConfig, hf_config, declared_only=True, **parts)
