"""A plain PyTorch loop on one process: the yardstick of the trainer. Stock model, torch AdamW, clipping by the norm."""

from __future__ import annotations

import torch

from benchmarks.rivals.same_task import SameTask


def main() -> None:
    task = SameTask()
    model = task.model()
    optimizer = task.adamw(model)

    def step() -> None:
        for _ in range(task.accumulation):
            (task.loss(model) / task.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.config.optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    task.time(step)


if __name__ == "__main__":
    main()
