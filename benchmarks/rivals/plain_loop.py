"""A plain PyTorch loop on one process: the yardstick of the trainer. Stock model, torch AdamW, clipping by the norm."""

from __future__ import annotations

from benchmarks.rivals.same_task import SameTask


def main() -> None:
    task = SameTask()
    task.time_loop(task.model())


if __name__ == "__main__":
    main()
