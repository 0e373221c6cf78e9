"""The task that rival trainers share: the model, the batches and the optimizer of a run file, and their speed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pretrain.config.schema import Config, load_config
from pretrain.data import load_tokenizer


class SameTask:
    """The task of a command line: `python -m benchmarks.rivals.NAME CONFIG STEPS [KEY=VALUE ...]`.

    Attributes:
        config: the run file, with the overrides.
        steps: optimizer steps to take.
        ranks: ranks that share a batch.
        accumulation: micro-batches of a rank in a step.
        device: where the rank computes.
        model_config: the configuration of the stock model.
    """

    def __init__(self, ranks: int = 1, rank: int = 0) -> None:
        """Read the command line. ranks, rank: this rank's place among those that share a batch."""
        self.config: Config = load_config(sys.argv[1], sys.argv[3:])
        self.steps, self.ranks, self._first = int(sys.argv[2]), ranks, rank == 0
        data = self.config.data
        self.accumulation = data.largest_batch // (data.micro_batch_size * ranks)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vocab_size = len(load_tokenizer(self.config.tokenizer))
        fields = {"vocab_size": self.vocab_size, "max_position_embeddings": data.seq_len, **self.config.model.hf_fields}
        self.model_config = AutoConfig.for_model(self.config.model.family, **fields)

    def model(self) -> PreTrainedModel:
        """Return the stock model."""
        return AutoModelForCausalLM.from_config(self.model_config).to(self.device)

    def adamw(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return torch's AdamW with the run's rates."""
        optim = self.config.optim
        return torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)

    def loss(self, model: Callable[..., Any]) -> torch.Tensor:
        """Return the cross-entropy of a micro-batch of random tokens, from full logits."""
        data = self.config.data
        shape = (data.micro_batch_size, data.seq_len + 1)
        tokens = torch.randint(0, self.vocab_size, shape, device=self.device)
        logits: torch.Tensor = model(tokens[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def time_loop(self, model: torch.nn.Module, before: Callable[[int], object] = lambda number: None) -> None:
        """Time a plain loop with AdamW and clipping by the norm. `before` is called with the number of each micro-batch."""
        optimizer = self.adamw(model)

        def step() -> None:
            for number in range(self.accumulation):
                before(number)
                (self.loss(model) / self.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.optim.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()

        self.time(step)

    def time(self, step: Callable[[], object]) -> None:
        """Take the steps, and print the median tokens/s of those after the first third."""
        seconds = []
        for _ in range(self.steps):
            began = time.perf_counter()
            step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        self.report(seconds)

    def report(self, seconds: list[float]) -> None:
        """Print the median tokens/s of steps that took so many seconds each, without the first third. Rank 0 prints."""
        if self._first:
            print(self.config.tokens_per_step / statistics.median(seconds[self.steps // 3 :]))

    @classmethod
    def on_ranks(cls) -> SameTask:
        """Return the task of a rank that a launcher has started, after it has met the others."""
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        return cls(dist.get_world_size(), dist.get_rank())
