"""The stages that show whether a GPU computes what a CPU computes, and what it repeats bit for bit."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from pretrain.data.batches.batch import MicroBatch
from pretrain.engine.step import losses_of, train_step
from pretrain.export.convert import convert
from pretrain.gpu_check.stage import Stage, losses, train_rows
from pretrain.paths import REPOSITORY
from pretrain.sharded.full import gathered
from pretrain.trainer.trainer import Trainer

BF16 = {"bf16": {"enabled": True}}
MICRO_BATCHES = 4
# Files whose waits are avoidable, and were avoided: DeepSpeed's timer, transformers' masks, our own way to the gate. The
# others are one reading of loss and norm, and DeepSpeed's own: docs/performance.md.
AVOIDABLE = (
    "timer.py",
    "masking_utils.py",
    "sdpa_attention.py",
    "modeling_llama.py",
    "step.py",
    "on_device.py",
    "loss.py",
)
_BROAD = {  # enough work for the order of additions to vary
    "model.hidden_size": 256,
    "model.intermediate_size": 704,
    "model.num_hidden_layers": 4,
    "data.seq_len": 512,
    "data.micro_batch_size": 4,
}


def zero(stage: int, half: bool = True) -> dict:
    """Return the content of a DeepSpeed file of this ZeRO stage, in bf16 or fp32."""
    return {"zero_optimization": {"stage": stage}, **(BF16 if half else {})}


def on_the_cpu(stage: Stage) -> None:
    """Train the reference on the CPU in fp32."""
    run = stage.trained(stage.config("cpu", {}))
    stage.say("fp32", None, f"losses {_shown(losses(run))}")


def equals_the_cpu(stage: Stage) -> None:
    """Train what the CPU has trained, eagerly, compiled and from its checkpoint, and compare the losses."""
    expected = losses(stage.folder / "runs/cpu")
    checkpoint = str(stage.folder / "runs/cpu/checkpoints/step_00000003")
    cases = {
        "eager": {},
        "compiled": {"compile": "layers"},
        "from the CPU's checkpoint": {"checkpoint.resume": checkpoint},
    }
    for name, settings in cases.items():
        found = losses(stage.trained(stage.config(_folder_name("gpu", name), settings)))
        largest = max(abs(found[step] / expected[step] - 1) for step in found)
        stage.say(name, largest < 2e-4, f"largest relative difference of a loss {largest:.1e}, allowed 2e-4")


def tvr_exact(stage: Stage) -> None:
    """Compare TVR's deviations and rescaled weights with the dense weights in float64."""
    tvr = {"name": "tvr", "target_std": 0.01, "ratio_threshold": 1.0001, "interval_steps": 1000}
    for number in (1, 2, 3):
        settings = {"methods": [tvr], "deepspeed": zero(number), "steps": 2000}
        trainer = stage.trainer(stage.config(f"tvr_{number}", settings))
        for _ in range(2):
            trainer.train_one_step()
        before = {name: full.cpu().double() for name, full in gathered(trainer.weights)}
        measured = trainer.plan.config.methods[0].after_step(1000, trainer.weights)
        deviation = max(abs(float(values["std"]) / float(before[name].std()) - 1) for name, values in measured.items())
        weight = 0.0
        for name, full in gathered(trainer.weights):
            expected = before[name]
            if name in measured:
                scale = 0.01 / before[name].std()
                expected = before[name] * scale + before[name].mean() * (1 - scale)
            weight = max(weight, float((full.cpu().double() - expected).abs().max() / expected.abs().max()))
        rescaled = sum(bool(values["rescaled"]) for values in measured.values())
        note = f"{rescaled} matrices; relative error of a deviation {deviation:.1e}, of a weight {weight:.1e}"
        # float64 sums in another order, and a few roundings to float32
        stage.say(f"ZeRO-{number} bf16", deviation < 1e-12 and weight < 2**-22 and rescaled > 0, note)
        trainer.loader.close()


def every_ds_config(stage: Stage) -> None:
    """Take two steps with every shipped DeepSpeed file, and compare the first loss with the others'."""
    first: dict[str, float] = {}
    for path in sorted((REPOSITORY / "ds_configs").glob("*.json")):
        settings = {"deepspeed": str(path), "steps": 2}
        found = losses(stage.trained(stage.config(f"ds_{path.stem}", settings)))
        first[path.stem] = found[1]
        close = abs(found[1] / next(iter(first.values())) - 1) < 0.01
        stage.say(path.name, all(map(isfinite, found.values())) and close, f"losses {_shown(found)}")


def waits_of_the_host(stage: Stage) -> None:
    """Count how often torch warns that the host waits for the GPU in a step, by the lines that wait."""
    for number in (1, 2, 3):
        settings = {"deepspeed": zero(number), "steps": 1000, "methods": []}
        trainer = stage.trainer(stage.config(f"waits_{number}", settings))
        for _ in range(3):
            trainer.train_one_step()
        batches = trainer.loader.next_batch()
        assert len(batches) == MICRO_BATCHES
        with _waits() as places:
            result = train_step(trainer.gate, trainer.step + 1, batches, 1e-3, stage.ranks, masked=False)
            trainer.recorder.end_step(trainer.step + 1, trainer.samples, result.losses, 1e-3, result.clip_factor)
        shown = "; ".join(f"{count}x {place}" for place, count in places.most_common())
        note = f"{places.total()} in a step of {MICRO_BATCHES} micro-batches: {shown}"
        stage.say(f"ZeRO-{number} bf16", not any(place.startswith(AVOIDABLE) for place in places), note)
        trainer.loader.close()


def repeated(stage: Stage, deterministic: bool) -> None:
    """Train a run twice, and a third time from the first one's checkpoint, and compare every digit."""
    kind = "on" if deterministic else "off"
    settings = {"deepspeed": zero(1), "deterministic": deterministic, **({} if stage.quick else _BROAD)}
    first = stage.trained(stage.config(f"deterministic_{kind}_first", settings))
    checkpoint = str(first / "checkpoints/step_00000003")
    cases = {"repeated": {}, "resumed": {"checkpoint.resume": checkpoint}}
    for name, more in cases.items():
        again = stage.trained(stage.config(f"deterministic_{kind}_{name}", {**settings, **more}))
        steps = {row["step"] for row in train_rows(again)}
        digits = [
            {row["step"]: _digits(row) for row in train_rows(run) if row["step"] in steps} for run in (first, again)
        ]
        differing = [step for step in sorted(steps) if digits[0][step] != digits[1][step]]
        found = f"differs from step {differing[0]} on" if differing else "equal bit for bit"
        stage.say(f"{name}, deterministic {kind}", not differing if deterministic else None, found)


def documents_apart(stage: Stage) -> None:
    """Compare two documents in one row with the same documents alone, and change the first one under the second."""
    generator = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(2, 500, (1, length), generator=generator) for length in (200, 312, 200))
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        settings = {"data.document_attention": True, "deepspeed": zero(1, precision == "bf16"), "methods": []}
        settings |= {"data.seq_len": 512}
        trainer = stage.trainer(stage.config(f"documents_{precision}", settings))
        trainer.engine.eval()
        loss = partial(_loss_of_documents, trainer)
        expected = (199 * loss([first], [True]) + 311 * loss([second], [True])) / 510  # by targets within a document
        difference = loss([first, second], [True, True]) / expected - 1
        leak = loss([first, second], [False, True]) - loss([other, second], [False, True])
        note = f"relative difference from documents alone {difference:.1e}, allowed {tolerance:g}; leak {leak:.1e}"
        stage.say(precision, abs(difference) < tolerance and leak == 0, note)
        trainer.loader.close()


def conversion(stage: Stage) -> None:
    """Train in bf16, convert the last checkpoint, and prove its logits."""
    run = stage.trained(stage.config("converted", {"deepspeed": zero(1)}))
    exported = convert(run / "checkpoints/latest", stage.folder / "exported")
    stage.say("bf16, ZeRO-1", exported.proof.holds, str(exported.proof))


@contextmanager
def _waits() -> Iterator[Counter[str]]:
    """Count the warnings of torch about waits of the host within the block, by the place that caused them."""
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def _loss_of_documents(trainer: Trainer, documents: list[torch.Tensor], counted: list[bool]) -> float:
    """Return the loss of one row of documents whose attention ends with each; only targets within counted ones count."""
    tokens = torch.cat([*documents, documents[0][:, :1]], dim=1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in documents])[None]
    masks = [
        torch.arange(1, text.shape[1] + 1) < text.shape[1] * counts
        for text, counts in zip(documents, counted, strict=True)
    ]
    batch = MicroBatch(tokens, torch.cat(masks)[None], positions)
    with torch.no_grad():
        return float(losses_of(trainer.engine, batch.to(trainer.ranks.device))["cross_entropy"])


def _digits(row: dict) -> str:
    return json.dumps([row["loss"], row["grad_norm"]])


def _shown(by_step: dict[int, float]) -> str:
    return " ".join(f"{loss:.6f}" for loss in by_step.values())


def _folder_name(*parts: str) -> str:
    return "_".join(parts).replace(" ", "_").replace("'", "")
