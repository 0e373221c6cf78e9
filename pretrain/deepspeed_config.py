"""The dict that DeepSpeed gets: the user's JSON, with "auto" filled in, every default that bites written out, and
contradictions to the run file refused.

DeepSpeed accepts misspelt top-level keys in silence, accumulates gradients in bf16 unless told otherwise, and has
changed what unset keys mean between releases. So the keys are checked here and those values are always written.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.config import Config
from pretrain.data.loader import check_batch_sizes
from pretrain.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

# Keys of DeepSpeed's JSON that may be given. `optimizer` and `scheduler` belong to the run file.
_KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "checkpoint",
    "aio",
    "timers",
}

_NOT_HERE = {
    "optimizer": "the run file's 'optim' section builds the optimizer",
    "scheduler": "the run file's 'optim.schedule' sets the learning rate",
    "fp16": "fp16 loss scaling is not supported; use bf16, or fp32 by leaving both out",
    "torch_autocast": "mixed precision comes from the 'bf16' block",
    "tensor_parallel": "tensor parallelism is not supported yet",
    "activation_checkpointing": "set 'activation_checkpointing: true' in the run file",
}

# What DeepSpeed would choose otherwise, and why not: see docs/deepspeed.md.
_ALWAYS = {
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
    "prescale_gradients": False,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {"tag_validation": "Fail"},
}


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run on `world_size` ranks.

    Raises UserError for an unreadable file, an unknown key, a value that contradicts the run file, or a global batch
    that the ranks cannot share.
    """
    source, given = read_deepspeed(config)
    _check_keys(given, source)
    computed = {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optim.grad_clip or 0.0,
    }
    for key, value in computed.items():
        if given.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{source} sets {key} to {given[key]}, but the run file makes it {value}. "
                f'Remove the key from the DeepSpeed file or set it to "auto".'
            )
    zero = {key: value for key, value in _block(given, "zero_optimization", source).items() if value != "auto"}
    _check_zero(zero, source)
    bf16 = {"enabled": False, "check_grad_overflow": False, **_block(given, "bf16", source)}
    _check_bf16(bf16, source)
    data_types = {**_ALWAYS["data_types"], **_block(given, "data_types", source)}
    if unknown := data_types.keys() - _ALWAYS["data_types"].keys():
        raise UserError(f"{source}: unknown key 'data_types.{min(unknown)}'; known is: grad_accum_dtype.")
    if bf16["enabled"] and zero.get("stage", 0) == 0:
        raise UserError(
            f"{source}: DeepSpeed cannot accumulate gradients in fp32 with bf16 and ZeRO stage 0. Use stage 1."
        )
    blocks = {"zero_optimization": zero, "bf16": bf16, "fp16": {"enabled": False}, "data_types": data_types}
    return {**_ALWAYS, **given, **computed, **blocks}


def read_deepspeed(config: Config) -> tuple[str, dict[str, Any]]:
    """What the run file names under `deepspeed`: a name for messages, and the JSON's content.

    A relative path counts from the working directory, then from this repository.
    """
    if isinstance(config.deepspeed, dict):
        return "the run file's 'deepspeed'", config.deepspeed
    path = next((p for p in (Path(config.deepspeed), REPOSITORY / config.deepspeed) if p.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(f"ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*.json")))
        raise UserError(f"deepspeed: there is no file {config.deepspeed}. Shipped with Evenkeel: {shipped}.")
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return str(path), content


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches per rank and optimizer step. Raises UserError where the global batch does not divide."""
    data = config.data
    check_batch_sizes(data.global_batch_size, data.micro_batch_size, world_size)
    return data.global_batch_size // (data.micro_batch_size * world_size)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"the key {', '.join(sorted(twice))} stands twice")
    return dict(pairs)


def _check_keys(given: dict[str, Any], source: str) -> None:
    for key in given:
        if key in _NOT_HERE:
            raise UserError(f"{source} has a '{key}' block, which is not taken from there: {_NOT_HERE[key]}.")
        if key not in _KNOWN_KEYS:
            near = difflib.get_close_matches(key, _KNOWN_KEYS, 1, 0.6)
            hint = f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(sorted(_KNOWN_KEYS))}."
            raise UserError(f"{source}: unknown key '{key}'; {hint}")


def _block(given: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    block = given.get(name, {})
    if not isinstance(block, dict):
        raise UserError(f"{source}: {name} must be a block of keys, not {block!r}.")
    return block


def _check_bf16(bf16: dict[str, Any], source: str) -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config

    parsed = _parse(DeepSpeedBF16Config, bf16, "bf16", source)
    if not isinstance(bf16["enabled"], bool):  # DeepSpeed reads "auto" as its own default
        raise UserError(f"{source}: bf16.enabled must be true or false: the run file has no key that it could follow.")
    if parsed.bf16_master_weights_and_grads:
        raise UserError(f"{source}: bf16.bf16_master_weights_and_grads is not supported: the master weights are fp32.")


def _parse(block_class: type[BaseModel], block: dict[str, Any], name: str, source: str) -> Any:
    """`block` as DeepSpeed itself reads it."""
    try:
        return block_class(**block)
    except ValidationError as error:
        mistakes = "; ".join(".".join(map(str, (name, *e["loc"]))) + f": {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: {mistakes}.") from error


def _check_zero(zero: dict[str, Any], source: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parsed = _parse(DeepSpeedZeroConfig, zero, "zero_optimization", source)
    for block in (parsed.offload_optimizer, parsed.offload_param):
        if block is not None and block.device == "nvme":
            raise UserError(f"{source}: weights offloaded to NVMe cannot be controlled yet; offload to the CPU.")
