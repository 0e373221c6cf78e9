"""Hugging Face Trainer with the run's DeepSpeed file, which accelerate hands to DeepSpeed."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.rivals.same_task import SameTask
from pretrain import quiet  # noqa: F401
from pretrain.distributed.ranks import initialize
from pretrain.engine.deepspeed_config import read_deepspeed


class RandomSequences(Dataset):
    """Sequences of random tokens, as many as the steps read."""

    def __init__(self, task: SameTask) -> None:
        self.count = task.steps * task.config.data.largest_batch
        self.length, self.vocab_size = task.config.data.seq_len, task.vocab_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, self.vocab_size, (self.length,))
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """Takes the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: object, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    ranks = initialize()  # DeepSpeed would compile a collective on a CPU otherwise
    task, clock = SameTask(ranks.world_size, ranks.rank), Clock()
    ds_config = {**read_deepspeed(task.config)[1], "zero_allow_untested_optimizer": True}
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            max_steps=task.steps,
            per_device_train_batch_size=task.config.data.micro_batch_size,
            gradient_accumulation_steps=task.accumulation,
            learning_rate=task.config.optim.lr,
            weight_decay=task.config.optim.weight_decay,
            max_grad_norm=task.config.optim.grad_clip or 0.0,
            use_cpu=task.device.type == "cpu",
            deepspeed={**ds_config, "zero_force_ds_cpu_optimizer": False},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=task.model(), args=arguments, train_dataset=RandomSequences(task), callbacks=[clock]).train()
    task.report(clock.seconds)


if __name__ == "__main__":
    main()
