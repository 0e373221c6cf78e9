"""The model card of an exported folder: what the model is, how to use it, how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import yaml

from pretrain.config.schema import Config
from pretrain.export.proof import Proof, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_card(
    config: Config,
    hf_config: PreTrainedConfig,
    reasons: Mapping[str, str],
    step: int,
    weights: str,
    parameters: int,
    dtype: torch.dtype,
    proof: Proof,
) -> str:
    """Return README.md, with the front matter that the Hugging Face hub reads.

    Args:
        config: The configuration of the run.
        hf_config: That of the exported class.
        reasons: As in `Written` of convert.py.
        step: The last step of the training.
        weights: What the weights are, in words.
        parameters: How many the model has.
        dtype: The stored dtype.
        proof: The comparison of the logits.
    """
    own = is_own(hf_config)
    trust = ", trust_remote_code=True" if own else ""
    loaded_by = "with `trust_remote_code=True`" if own else "by stock transformers"
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["evenkeel", hf_config.model_type, *(method.name for method in config.methods)],
    }
    provenance = {
        "architecture": f"{class_name(hf_config)}, {parameters:,} parameters, stored as {name_of(dtype)}",
        "run": f"`{config.name}`, seed {config.seed}",
        "trained": f"{step:,} of {config.total_steps:,} steps, {config.tokens_after(step):,} tokens",
        "weights": weights,
        "batch": f"{_batch(config)} sequences of {config.data.seq_len} tokens",
        "optimizer": f"{config.optim.name}, peak learning rate {config.optim.lr:g}, {config.optim.schedule.name} schedule",
    }
    if config.model.init_from is not None:
        provenance["started from"] = f"the weights of {config.model.init_from.path}"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {config.name}

A language model pretrained with Evenkeel. {_class_in_words(hf_config)}

```python
from transformers import pipeline

generate = pipeline("text-generation", model="PATH_OR_NAME_OF_THIS_FOLDER"{trust})
print(generate("The", max_new_tokens=64)[0]["generated_text"])
```

## Provenance

| | |
| --- | --- |
{_rows(provenance)}

## Methods

{_methods(config, reasons)}

## Proof of conversion

These files, loaded {loaded_by}, give the trainer's own logits on a fixed batch:
{proof}.
"""


def _batch(config: Config) -> str:
    sizes = config.data.batch_sizes
    return f"{sizes.end}" if sizes.start == sizes.end else f"{sizes.start} to {sizes.end}"


def is_own(hf_config: PreTrainedConfig) -> bool:
    """Return whether an exported model's class comes with it, because no stock class can hold the model."""
    return bool(getattr(hf_config, "auto_map", None))


def class_name(hf_config: PreTrainedConfig) -> str:
    """Return the name of the class that holds an exported model."""
    assert hf_config.architectures, "an exported configuration names its class"
    return hf_config.architectures[0]


def _class_in_words(hf_config: PreTrainedConfig) -> str:
    name = class_name(hf_config)
    if not is_own(hf_config):
        return f"It is a stock {name}; no code of the trainer is needed."
    file = hf_config.auto_map["AutoModelForCausalLM"].partition(".")[0]
    return (
        f"No class of transformers can hold it (Methods, below, says why), so its own, {name}, lies beside the weights in "
        f"`{file}.py`. That file needs only torch and transformers; read it, then allow it with `trust_remote_code=True`:"
    )


def _rows(provenance: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in provenance.items())


def _methods(config: Config, reasons: Mapping[str, str]) -> str:
    if not config.methods:
        return "None: a plain baseline."
    listed = [method.model_dump(mode="json") for method in config.methods]
    made = "\n".join(
        f"- `{method.name}`: {reasons.get(method.name, 'the weights are plain, nothing had to be changed')}"
        for method in config.methods
    )
    return (
        f"As listed in the run, with their options:\n\n```yaml\n{yaml.safe_dump(listed, sort_keys=False)}```"
        f"\n\nWhat the conversion made of them:\n\n{made}{_allowed(config)}"
    )


def _allowed(config: Config) -> str:
    """Return a paragraph about pairs that were trained against advice, if there are any."""
    lines = [f"- {' + '.join(sorted(pair.methods))}: {pair.because}" for pair in config.allowed]
    return "\n\nTrained together against advice, for the reason given:\n\n" + "\n".join(lines) if lines else ""
