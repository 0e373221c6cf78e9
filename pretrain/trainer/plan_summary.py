"""The plan of a run in lines for the person who queues it."""

from __future__ import annotations

from math import ceil

import torch
from transformers import PreTrainedConfig

from pretrain.checkpoints.folders import complete_checkpoints
from pretrain.config.schema import Config
from pretrain.engine.compiled_blocks import why_eager
from pretrain.files import free_bytes
from pretrain.methods import clashes_of
from pretrain.optim.schedule import learning_rate
from pretrain.optimizers import OPTIMIZERS
from pretrain.planning.memory import memory_of, states_of
from pretrain.planning.text import describe_memory, size_text
from pretrain.trainer.plan import Plan, existing_folder

_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "attention_dropout")  # fields of the families' configurations

_RECOMPUTED = {
    "off": "",
    "full": ", computed again in the backward pass",
    "selective": ", computed again in the backward pass but for matrix products and attention",
}


def describe_plan(plan: Plan) -> str:
    """Describe the plan in lines for the person who queues the run."""
    config, data = plan.config, plan.config.data
    tokens = config.tokens_after(config.total_steps)
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    lines = {
        "model": f"{config.model.family}, {short(plan.parameters)} parameters, vocabulary "
        f"{plan.model_config.vocab_size:,}",
        **_describe_dropout(plan.model_config),
        "data": plan.corpora.describe(tokens // data.seq_len),
        "length": f"{config.total_steps:,} steps {_describe_step(config)} = {short(tokens)} tokens, "
        f"{plan.flops_per_token * tokens:.2e} FLOPs",
        "rate": _describe_rate(config),
        "batch": f"{data.largest_batch} sequences of {data.seq_len} = {plan.data_ranks} data-parallel ranks x "
        f"{plan.accumulation_steps} micro-batches of {data.micro_batch_size}" + _describe_ramp(config),
        "sharding": f"ZeRO-{plan.zero_stage}, {plan.precision}"
        + (f", {tensor} tensor-parallel ranks" if tensor > 1 else "")
        + (f", {sequence} ranks share a sequence" if sequence > 1 else ""),
        "blocks": _describe_blocks(config),
        "memory": f"{describe_memory(states_of(plan))} (activations come on top)",
        "disk": _describe_disk(plan),
        "optimizer": OPTIMIZERS[config.optim.name].summary,
        "methods": ", ".join(method.name for method in config.methods) or "none",
        **_describe_allowed(config),
        **({"start": str(plan.start)} if plan.start else {}),
    }
    return "\n".join(f"{key:<9} {value}" for key, value in lines.items())


def _describe_step(config: Config) -> str:
    """Return the tokens of a step."""
    first, last = (size * config.data.seq_len for size in (config.data.batch_sizes.start, config.data.largest_batch))
    return f"x {last:,} tokens" if first == last else f"of {first:,} to {last:,} tokens"


def _describe_ramp(config: Config) -> str:
    """Return how the batch grows, nothing where it does not."""
    given = config.data.global_batch_size
    if isinstance(given, int):
        return ""
    steps = config.data.batch_sizes.steps_between(0, ceil(given.ramp_tokens / config.data.seq_len))
    return (
        f"; the first {steps:,} steps, {short(given.ramp_tokens)} tokens, take from {given.start} sequences on, {given.steps_of} "
        "more at a time"
    )


def describe_whole_memory(plan: Plan) -> str:
    """Return a line about the memory of a rank, activations included. Counting them takes seconds."""
    return describe_memory(memory_of(plan, _gpu_bytes()))


def short(count: float) -> str:
    """Return a count with three digits and its unit, such as 1.25M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _gpu_bytes() -> float | None:
    """Return the memory of this rank's GPU, None without one."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.is_available()
        else None
    )


def _describe_disk(plan: Plan) -> str:
    free = free_bytes(existing_folder(plan.config))
    one = plan.checkpoint_bytes
    at_once = plan.config.checkpoint.keep_last + 1  # the new one is written before the old one goes
    wanted = (at_once - len(complete_checkpoints(plan.config.folder / "checkpoints"))) * one
    figures = f"{size_text(one)} per checkpoint, up to {at_once} at a time"
    if free is None:
        return f"{figures}; how much is free is not known"
    return f"{figures}; {free / 1e9:.1f} GB free" + (f", {wanted / 1e9:.1f} GB WILL BE NEEDED" if wanted > free else "")


def _describe_dropout(model_config: PreTrainedConfig) -> dict[str, str]:
    """Return a line if the model trains with dropout. Few expect it, but it is the default of Hugging Face's GPT-2."""
    rates = {field: getattr(model_config, field, 0.0) for field in _DROPOUTS}
    fields = [f"model.{field} {rate:g}" for field, rate in rates.items() if rate]
    return {"dropout": ", ".join(fields) + " in training"} if fields else {}


def _describe_allowed(config: Config) -> dict[str, str]:
    """Return a line about the pairs of methods that are trained against advice, if there are any."""
    reasons = {clash.methods: clash.reason for clash in clashes_of(config.methods)}
    pairs = [
        f"{' + '.join(sorted(pair.methods))}, against advice ({reasons[pair.methods]}), because: {pair.because}"
        for pair in config.allowed
    ]
    return {"allowed": "; ".join(pairs)} if pairs else {}


def _describe_blocks(config: Config) -> str:
    """Return how the decoder blocks are run."""
    reason = why_eager(config)
    how = "compiled" if reason is None else f"eager ({reason})"
    return how + _RECOMPUTED[config.activation_checkpointing]


def _describe_rate(config: Config) -> str:
    optim, warmup, total = config.optim, config.optim.schedule.warmup_steps, config.total_steps
    last = learning_rate(optim, total, total)
    if warmup > total:
        return f"NEVER REACHES optim.lr {optim.lr:g}: warmup takes {warmup:,} steps, and the run ends at {last:g}"
    return f"{optim.lr:g}, warmup over {warmup:,} steps, {optim.schedule.name} to {last:g} at the last"
