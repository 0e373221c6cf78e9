"""The configuration that DeepSpeed gets: the user's JSON, completed and checked against the run file.

"auto" is filled in. DeepSpeed accepts misspelt top-level keys in silence, accumulates gradients in bf16 by default, and
has changed the meaning of unset keys between releases. So the keys are checked here, and these defaults are always written.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pretrain.config.schema import Config
from pretrain.data.batches.loader import check_sizes
from pretrain.engine.deepspeed_blocks import Kinds, block, check_finite, check_kind
from pretrain.engine.precision import precision_blocks, precision_of
from pretrain.engine.tensor_parallel import data_ranks, tensor_parallel_block
from pretrain.engine.zero_checks import check_zero
from pretrain.errors import UserError
from pretrain.optimizers import OPTIMIZERS, Layout
from pretrain.paths import REPOSITORY

# Keys of DeepSpeed's JSON that may be given, and the kind of each: DeepSpeed checks few of them before it uses them.
# `optimizer` and `scheduler` belong to the run file.
_SWITCH: Kinds = (bool,)
_BLOCK: Kinds = (dict,)
_NUMBER: Kinds = (int, float)
_KNOWN_KEYS: dict[str, Kinds] = {
    "train_batch_size": _NUMBER,
    "train_micro_batch_size_per_gpu": _NUMBER,
    "gradient_accumulation_steps": _NUMBER,
    "gradient_clipping": _NUMBER,
    "zero_optimization": _BLOCK,
    "bf16": _BLOCK,
    "fp16": _BLOCK,
    "data_types": _BLOCK,
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "prescale_gradients": _SWITCH,
    "gradient_predivide_factor": _NUMBER,
    "gradient_allreduce_op": ("mean",),
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
    "steps_per_print": _NUMBER,
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "dump_state": _SWITCH,
    "comms_logger": _BLOCK,
    "flops_profiler": _BLOCK,
    "checkpoint": _BLOCK,
    "aio": _BLOCK,
    "timers": _BLOCK,
}
_DIVISORS = ("gradient_predivide_factor", "steps_per_print")
_FROM_THE_RUN_FILE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)

_NOT_HERE = {
    "optimizer": "the run file's 'optim' section builds the optimizer",
    "scheduler": "the run file's 'optim.schedule' sets the learning rate",
    "torch_autocast": "mixed precision comes from the 'bf16' or the 'fp16' block",
    "tensor_parallel": "set parallel.tensor in the run file",
    "sequence_parallel_size": "set parallel.sequence in the run file",
    "wandb": "set log.wandb in the run file",
    "activation_checkpointing": "set 'activation_checkpointing: full' in the run file",
}

# The reasons, and the values that DeepSpeed would choose: docs/deepspeed.md.
_ALWAYS = {
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
    "prescale_gradients": False,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {"tag_validation": "Fail"},
    "timers": {"throughput": {"enabled": False}},
}


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run on `world_size` ranks.

    Raises:
        UserError: the file cannot be read, has an unknown key, a value that contradicts the run file or that is not
            supported, or the ranks cannot share the global batch.
    """
    source, given = read_deepspeed(config)
    _check_keys(given, source)
    computed = {
        "train_batch_size": config.data.largest_batch,
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
    zero = {key: value for key, value in block(given, "zero_optimization", source).items() if value != "auto"}
    check_zero(zero, source)
    precision = precision_blocks(given, source, zero.get("stage", 0))
    _check_with_tensor_parallel(config.parallel.tensor, zero, precision, source)
    zero = _for_optimizer(config, zero, precision, source)
    resolved = {**_ALWAYS, **given, **computed, "zero_optimization": zero, **precision}
    if data_ranks(config, world_size) != world_size:
        # DeepSpeed checks this key against the number of all ranks, but the ranks of a group read the same batch.
        del resolved["train_batch_size"]
    return {**resolved, **tensor_parallel_block(config)}


def read_deepspeed(config: Config) -> tuple[str, dict[str, Any]]:
    """Return the JSON that the run file names under `deepspeed`: a name for messages, and its content.

    A relative path counts from the working directory, then from this repository.
    """
    if isinstance(config.deepspeed, dict):
        return "the run file's 'deepspeed'", config.deepspeed
    path = next((p for p in (Path(config.deepspeed), REPOSITORY / config.deepspeed) if p.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(f"ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*.json")))
        raise UserError(f"deepspeed: there is no file {config.deepspeed}. Shipped with Evenkeel: {shipped}.")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return str(path), content


def accumulation_steps(config: Config, world_size: int) -> int:
    """Return the micro-batches per rank and optimizer step, after the ramp if there is one.

    Raises:
        UserError: the ranks cannot share the global batch of some step.
    """
    data = config.data
    readers = data_ranks(config, world_size)
    check_sizes(data.batch_sizes, data.micro_batch_size, readers)
    return data.largest_batch // (data.micro_batch_size * readers)


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
        if given[key] != "auto" or key not in _FROM_THE_RUN_FILE:
            check_kind(given[key], _KNOWN_KEYS[key], f"{source}: {key}")
        if key in _DIVISORS and given[key] <= 0:
            raise UserError(f"{source}: {key} must be more than 0, not {given[key]}.")
    tag = block(given, "checkpoint", source).get("tag_validation", "Warn")
    if str(tag).upper() not in ("WARN", "IGNORE", "FAIL"):
        raise UserError(f"{source}: checkpoint.tag_validation must be Warn, Ignore or Fail, not {tag!r}.")
    check_finite(given, source)


def _for_optimizer(config: Config, zero: dict[str, Any], precision: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the zero_optimization block with the keys that the optimizer needs. Raises UserError where it is refused."""
    optimizer, accumulation = OPTIMIZERS[config.optim.name], precision["data_types"]["grad_accum_dtype"]
    layout = Layout(zero.get("stage", 0), precision_of(precision), accumulation, config.parallel.tensor, zero)
    for refusal in optimizer.refusals(layout):
        raise UserError(f"{source}: {refusal}.")
    return {**zero, **optimizer.zero_keys}


def _check_with_tensor_parallel(tensor: int, zero: dict[str, Any], precision: dict[str, Any], source: str) -> None:
    if tensor == 1:
        return
    if zero.get("stage", 0) == 0 and precision_of(precision) != "fp32":
        raise UserError(
            f"{source}: parallel.tensor {tensor} with {precision_of(precision)} needs ZeRO stage 1, 2 or 3: at stage 0 "
            "DeepSpeed leaves the other ranks' shares out of the gradient norm that it clips by."
        )
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise UserError(
            f"{source}: parallel.tensor {tensor} with zero_optimization.zero_hpz_partition_size is not supported: "
            "it is not tested which ranks share a weight then. Leave one of the two out."
        )
