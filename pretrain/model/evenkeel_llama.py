"""The model class for architectures that no class of transformers has. Importing this registers it with transformers.

`modeling_evenkeel.py` holds the whole class and is copied into exports.
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

# The entry of `conflicts` in methods that need this class: why they cannot be combined with softcap.
UNLIKE_SOFTCAP = {
    "softcap": "capped logits are exported as a VaultGemma, which has stock norms and residuals; z_loss or mu_centering "
    "keep logits small without a cap"
}

AutoConfig.register(EvenkeelLlamaConfig.model_type, EvenkeelLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(EvenkeelLlamaConfig, EvenkeelLlamaForCausalLM, exist_ok=True)


def bring_modeling_file(hf_config: PreTrainedConfig, folder: Path) -> None:
    """Copy the modelling file that a model needs into an exported folder, and name it in the configuration.

    A stock model needs none, and any name of one is removed.

    Args:
        hf_config: the model's configuration, changed in place.
        folder: the folder of the export.
    """
    vars(hf_config).pop("auto_map", None)
    if isinstance(hf_config, EvenkeelLlamaConfig):
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        classes = {"AutoConfig": EvenkeelLlamaConfig, "AutoModelForCausalLM": EvenkeelLlamaForCausalLM}
        hf_config.auto_map = {auto: f"{MODELING_FILE.stem}.{cls.__name__}" for auto, cls in classes.items()}


def evenkeel_llama(hf_config: PreTrainedConfig, **parts: Any) -> EvenkeelLlamaConfig:
    """Return a configuration of this class with more parts.

    Args:
        hf_config: the configuration of a LLaMA, a Qwen3 or this class.
        parts: fields of `EvenkeelLlamaConfig` to set.
    """
    if not isinstance(hf_config, EvenkeelLlamaConfig):
        parts = {"qk_norm": hf_config.model_type == "qwen3", **parts}
    return as_config(EvenkeelLlamaConfig, hf_config, declared_only=True, **parts)
