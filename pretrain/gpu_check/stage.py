"""The surroundings of a stage: the place of its files, the trainer, and a way to report findings."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pretrain.config.schema import Config, load_config
from pretrain.distributed import signals
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.determinism import compute_deterministically
from pretrain.gpu_check.material import Material
from pretrain.resilience.stop_requests import StopRequests
from pretrain.trainer.plan import make_plan
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.trainer import Trainer, train

# The run file that correctness is checked with. Everything in it can be overridden by a stage.
SMALL = """\
name: small
model: {family: llama, hidden_size: 64, intermediate_size: 176, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer: set by each stage
data: {train: set by each stage, seq_len: 64, global_batch_size: 8, micro_batch_size: 2}
steps: 6
optim: {lr: 5.0e-3, schedule: {warmup_steps: 2}}
methods: [{name: lir, initializer_range: 0.02}, {name: tvr, target_std: 0.018, ratio_threshold: 1.02, interval_steps: 2}]
deepspeed: {zero_optimization: {stage: 3}}
compile: off   # compiling takes longer than such a run
checkpoint: {interval_steps: 3}
log: {interval_steps: 1}
"""
SMALL_VOCABULARY = 512

Settings = Mapping[str, Any]


class Stage:
    """One stage that runs in this process.

    Attributes:
        folder: of the whole check.
        quick: whether everything is as small and short as it can be.
        say: `say(case, passed, note, **values)` records a finding. passed is None where there is nothing to pass.
    """

    def __init__(self, folder: Path, quick: bool, say: Callable[..., None]) -> None:
        self.folder, self.quick, self.say = folder, quick, say

    @cached_property
    def ranks(self) -> Ranks:
        """This process as the only rank of a run. The GPU is used from here on."""
        return initialize()

    @property
    def small(self) -> Material:
        """The material of small runs."""
        return Material(self.folder / "small/tokenizer", self.folder / "small/shards")

    @property
    def large(self) -> Material:
        """The material of runs of 1B."""
        return self.small if self.quick else Material(self.folder / "large/tokenizer", self.folder / "large/shards")

    def config(
        self, name: str, settings: Settings, run_file: Path | None = None, material: Material | None = None
    ) -> Config:
        """Return the configuration of a run: `run_file`, or the small one, with settings by keys with dots."""
        if run_file is None:
            run_file = self.folder / "small.yaml"
        chosen = {"name": name, "out": str(self.folder / "runs"), **(material or self.small).settings, **settings}
        return load_config(run_file, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])

    def trained(self, config: Config) -> Path:
        """Train the whole run, and return its folder."""
        folder = self._folder(config)
        train(make_plan(config, 1, 0), folder, self.ranks)
        self.forget()
        return folder.path

    def trainer(self, config: Config) -> Trainer:
        """Return the trainer of a run that has not taken a step yet."""
        folder = self._folder(config)
        requests = StopRequests(folder.path, self.ranks, signals.catch())
        return Trainer(make_plan(config, 1, 0), folder, self.ranks, requests)

    def _folder(self, config: Config) -> RunFolder:
        """Return the folder of a run. What the run asks of the whole process is done first, as train.py does it."""
        if config.deterministic:
            compute_deterministically()
        return RunFolder(config.folder, self.ranks)

    def forget(self) -> None:
        """Free what earlier runs of this process have left."""
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def train_rows(run: Path) -> list[dict[str, Any]]:
    """Return the `train` rows of a run folder."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of a run folder by step."""
    return {row["step"]: row["loss"] for row in train_rows(run)}
