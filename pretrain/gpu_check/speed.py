"""The stages that show how fast the shipped 1B model trains, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType

from pretrain.config.schema import Config
from pretrain.gpu_check.stage import SMALL_VOCABULARY, Settings, Stage, train_rows
from pretrain.monitor.throughput import peak_flops
from pretrain.paths import REPOSITORY
from pretrain.trainer.trainer import Trainer

WARM, MEASURED, PROFILED = 2, 4, 1  # steps
TVR_CALLS = 3
KERNELS = 10
MICRO_BATCHES = 8
NEVER = 10**6
# The shapes of a quick check. The vocabulary is that of the small material.
_TINY = {
    "model.hidden_size": 64,
    "model.intermediate_size": 176,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 4,
    "model.vocab_size": SMALL_VOCABULARY,
    "data.seq_len": 64,
    "data.micro_batch_size": 1,
    "data.global_batch_size": 2,
}


@dataclass(frozen=True)
class Case:
    """A way to train the model.

    Attributes:
        name: of its row in the table.
        settings: keys of the run file that it sets.
        run_file: the file of configs/ that it sets them in.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    run_file: str = "1b_tvr.yaml"


def _zero(stage: int, compile: str, **more: Any) -> Settings:
    return {"deepspeed": f"ds_configs/zero{stage}_bf16.json", "compile": compile, **more}


# In the order of importance: time may run out.
CASES = (
    Case("as shipped"),
    Case("ZeRO-3, eager", _zero(3, "off")),
    Case("ZeRO-3, compiled", _zero(3, "layers")),
    Case("ZeRO-1, eager", _zero(1, "off")),
    Case("ZeRO-1, compiled", _zero(1, "layers")),
    Case("ZeRO-1, compiled, selective recomputation", _zero(1, "layers", activation_checkpointing="selective")),
    Case("ZeRO-1, compiled, full recomputation", _zero(1, "layers", activation_checkpointing="full")),
    Case("ZeRO-1, compiled, wesar", _zero(1, "layers"), "1b_wesar.yaml"),
    Case("ZeRO-1, compiled, attention within documents", _zero(1, "layers", **{"data.document_attention": True})),
    Case("ZeRO-1, compiled, deterministic", _zero(1, "layers", deterministic=True)),
    Case("ZeRO-1, compiled, no method", _zero(1, "layers"), "1b_baseline.yaml"),
    Case("ZeRO-2, compiled", _zero(2, "layers")),
    Case("ZeRO-2, eager", _zero(2, "off")),
)


def measured(stage: Stage, names: list[str]) -> None:
    """Measure some of the cases, one after the other in this process."""
    for case in CASES:
        if case.name in names:
            try:
                _measure(stage, case)
            except torch.OutOfMemoryError as error:
                stage.say(case.name, None, f"out of memory: {str(error).partition('.')[0]}")
            stage.forget()


def profiled(stage: Stage) -> None:
    """Profile a step of the model as shipped, and list the kernels that take the most time."""
    trainer = stage.trainer(config_of(stage, CASES[0], "profiled"))
    for _ in range(WARM):
        trainer.train_one_step()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        for _ in range(PROFILED):
            trainer.train_one_step()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels = {event.key: (event.self_device_time_total, event.count) for event in events if _is_kernel(event)}
    kind = "kernels"
    if not kernels:  # a device without a profiler of its own
        kernels = {event.key: (event.self_cpu_time_total, event.count) for event in events}
        kind = "operations on the host"
    whole = sum(microseconds for microseconds, _ in kernels.values())
    for name, (microseconds, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:KERNELS]:
        note = f"{microseconds / 1e3:9.2f} ms  {microseconds / whole:6.1%} of all {kind}  {count:6d} calls"
        stage.say(name[:100], None, note)
    trainer.loader.close()


def config_of(stage: Stage, case: Case, name: str) -> Config:
    """Return the configuration of a case: its run file on random tokens, with TVR after every step."""
    run_file = REPOSITORY / "configs" / case.run_file
    own = stage.config(name, {}, run_file, stage.large)
    at_once = {
        "tokens": None,
        "steps": 1000,
        "data.global_batch_size": MICRO_BATCHES * own.data.micro_batch_size,
        "optim.schedule.warmup_steps": 0,
        "init.distribution": "uniform",  # drawn on the host in a third of the time of normal values
        "checkpoint.interval_steps": NEVER,
        "checkpoint.keep_every_steps": None,
        "log.interval_steps": 1,
        "log.weights_interval_steps": NEVER,
        "log.activations_interval_steps": NEVER,
        "resilience.watchdog_s": None,
    }
    for number, method in enumerate(own.methods):
        if method.name == "tvr":
            at_once[f"methods.{number}.interval_steps"] = 1
    return stage.config(name, {**at_once, **case.settings, **(_TINY if stage.quick else {})}, run_file, stage.large)


def _measure(stage: Stage, case: Case) -> None:
    config = config_of(stage, case, f"speed_{CASES.index(case)}")
    trainer = stage.trainer(config)
    steps = 1 if stage.quick else MEASURED
    for _ in range(1 if stage.quick else WARM):
        trainer.train_one_step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_one_step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - began) / steps
    tokens_per_s = config.tokens_per_step / step_s
    peak = peak_flops(trainer.plan.precision)
    stage.say(
        case.name,
        None,
        "",
        tokens_per_s=tokens_per_s,
        ms_per_micro_batch=1e3 * step_s * config.data.micro_batch_size / config.data.largest_batch,
        mfu=tokens_per_s * trainer.plan.flops_per_token / peak if peak else None,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        methods_share=_seconds_of_methods(trainer) / step_s,
        last_loss=train_rows(trainer.folder.path)[-1]["loss"],
    )
    trainer.loader.close()


def _seconds_of_methods(trainer: Trainer) -> float:
    """Return the time of what the methods do after a step, with the GPU idle before and after it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(TVR_CALLS):
        for method in trainer.plan.config.methods:
            method.after_step(trainer.step, trainer.weights)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / TVR_CALLS


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
