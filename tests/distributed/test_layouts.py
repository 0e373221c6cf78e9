"""Every layout trains the same model: ten steps with LIR and TVR against a dense LLaMA in one process.

The layouts are ZeRO stages 0 to 3, offloaded or not, tensor-parallel and sequence-parallel sizes, gradient accumulation and
numbers of ranks. A covering set is fast, all of them are slow:

    pytest -m "" -s tests/distributed/test_layouts.py

prints the table of docs/scaling.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dense import DenseLlama, RunSettings
from tests.support.runs import start_ranks
from tests.support.tiny_engines import VOCABULARY, tokens
from tests.support.workers.layout_worker import EPS, KV_HEADS, LR, OPTIM, SEQUENCES, SIZES, STEPS, TVR, examine_all

TOLERANCE = {"loss": 2e-6, "gradient norm": 2e-5, "weights": 2e-5}


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        accumulated: micro-batches of a step.
    """

    ranks: int
    tensor: int
    sequence: int
    stage: int
    offloaded: bool
    accumulated: int

    @property
    def name(self) -> str:
        offloaded = "_offloaded" if self.offloaded else ""
        parallel = f"{self.ranks}_ranks_tensor{self.tensor}_sequence{self.sequence}"
        return f"{parallel}_zero{self.stage}{offloaded}_accumulated{self.accumulated}"

    @property
    def processes(self) -> tuple[int, int]:
        """Layouts that the same processes can go through: DeepSpeed can cut models in a process or not, never both."""
        return self.ranks, self.tensor

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The same for layouts that are trained together where they are slow: few enough for the patience of `Job.wait`."""
        return self.ranks, self.tensor, self.sequence, self.stage

    @property
    def case(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage, "stage3_param_persistence_threshold": 100}
        if self.offloaded:
            zero["offload_optimizer"] = {"device": "cpu"}
        readers = self.ranks // (self.tensor * self.sequence)
        return {
            "deepspeed": {"zero_optimization": zero},
            "micro_batch_size": SEQUENCES // readers // self.accumulated,
            "tensor": self.tensor,
            "sequence": self.sequence,
        }


EVERY = [
    Layout(ranks, tensor, sequence, stage, offloaded, accumulated)
    for ranks, tensor, sequence in product((1, 2, 3, 4), (1, 2), (1, 2))
    if ranks % (tensor * sequence) == 0
    for stage, offloaded in ((0, False), *product((1, 2, 3), (False, True)))
    for accumulated in (1, 4)
]
FAST = [
    Layout(1, 1, 1, 2, False, 4),
    Layout(2, 1, 1, 2, True, 1),
    Layout(2, 1, 2, 0, False, 4),
    Layout(2, 1, 2, 1, True, 1),
    Layout(2, 1, 2, 2, False, 1),
    Layout(2, 1, 2, 3, False, 1),
    Layout(2, 1, 2, 3, True, 4),
    Layout(3, 1, 1, 1, False, 1),
    Layout(3, 1, 1, 3, False, 4),
    Layout(4, 2, 1, 3, True, 1),
    Layout(4, 2, 2, 1, False, 4),
    Layout(4, 2, 2, 3, False, 1),
]
PARAMETERS = [pytest.param(each, id=each.name, marks=[] if each in FAST else pytest.mark.slow) for each in EVERY]


class WithTVR(DenseLlama):
    """W <- (W - m) target / s + m for a block matrix whose deviation s is more than the threshold above the target."""

    def after_step(self) -> None:
        if self.steps % TVR["interval_steps"]:
            return
        for name, weight in self.weights.items():
            if name.startswith("model.layers.") and weight.dim() == 2:
                values = weight.data.double()
                ratio = float(values.std()) / TVR["target_std"]
                if ratio > TVR["ratio_threshold"]:
                    weight.data.copy_((values - values.mean()) / ratio + values.mean())


@dataclass(frozen=True)
class Trained:
    """What came of ten steps."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]


class Found:
    """The results of layouts, trained when one is first asked for: all fast ones at once, slow ones with their neighbours."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self.new_folder = new_folder
        self.folders: dict[str, Path] = {}

    def of(self, layout: Layout) -> tuple[Trained, dict[str, np.ndarray]]:
        """Return what came of a layout, and the weights that it started from."""
        if layout.name not in self.folders:
            slow = [each for each in EVERY if each not in FAST and each.neighbours == layout.neighbours]
            self._train(FAST if layout in FAST else slow)
        folder = self.folders[layout.name]
        figures = json.loads((folder / "found.json").read_text())[layout.name]
        arrays = np.load(folder / f"{layout.name}.npz")
        initial, final = (
            {key.partition("/")[2]: arrays[key] for key in arrays if key.startswith(when)}
            for when in ("initial", "final")
        )
        return Trained(figures["losses"], figures["norms"], final), initial

    def _train(self, layouts: list[Layout]) -> None:
        with ExitStack() as stack:
            jobs = []
            for processes in sorted({layout.processes for layout in layouts}):
                cases = {layout.name: layout.case for layout in layouts if layout.processes == processes}
                folder = self.new_folder()
                self.folders |= dict.fromkeys(cases, folder)
                prepare = partial(examine_all, cases, folder)
                jobs.append(stack.enter_context(start_ranks([], folder / "logs", processes[0], prepare=prepare)))
            for ended in [job.wait() for job in jobs]:
                assert ended.code == 0, ended.stderr[-5000:]

    @cached_property
    def dense(self) -> Trained:
        """What comes of ten steps in one process, from the weights that a layout has started from."""
        return densely(WithTVR, self.of(FAST[0])[1])

    def differences(self, layout: Layout) -> dict[str, float]:
        """Return the largest relative differences from the dense process."""
        return differences(self.of(layout)[0], self.dense)


def densely(model_class: type[DenseLlama], initial: dict[str, np.ndarray], clip: float = OPTIM["grad_clip"]) -> Trained:
    """Train in one process."""
    settings = RunSettings(
        hidden=SIZES["hidden_size"],
        intermediate=SIZES["intermediate_size"],
        layers=SIZES["num_hidden_layers"],
        heads=SIZES["num_attention_heads"],
        kv_heads=KV_HEADS,
        vocabulary=VOCABULARY,
        tied=False,
        eps=EPS,
        theta=10000.0,
        std=0.02,
        lrs=(LR,) * STEPS,
        peak_lr=LR,
        betas=(0.9, 0.95),
        adam_eps=OPTIM["eps"],
        weight_decay=OPTIM["weight_decay"],
        clip=clip,
    )
    model = model_class(settings, {name: torch.from_numpy(value) for name, value in initial.items()}, {})
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        losses.append(model.step(tokens(step, SEQUENCES))["cross_entropy"])
        norms.append(model.gradient_norm)
    return Trained(losses, norms, {name: value.detach().numpy() for name, value in model.weights.items()})


def differences(found: Trained, expected: Trained) -> dict[str, float]:
    """Return the largest relative differences, of weights by their norm."""
    assert found.weights.keys() == expected.weights.keys()
    return {
        "loss": _largest(found.losses, expected.losses),
        "gradient norm": _largest(found.norms, expected.norms),
        "weights": max(
            float(np.linalg.norm(found.weights[name] - value) / np.linalg.norm(value))
            for name, value in expected.weights.items()
        ),
    }


def _largest(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(lambda: tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", PARAMETERS)
def test_a_layout_trains_what_one_dense_process_trains(found: Found, layout: Layout) -> None:
    far = found.differences(layout)
    assert {key: value for key, value in far.items() if not value <= TOLERANCE[key]} == {}
    assert max(far.values()) > 0, "a process that adds up in another order differs in the last bits"


@pytest.mark.parametrize("layout", PARAMETERS)
def test_a_layout_starts_from_the_same_bits(found: Found, layout: Layout) -> None:
    (_, here), (_, there) = found.of(layout), found.of(FAST[0])
    assert all(np.array_equal(here[name], value) for name, value in there.items())


@pytest.mark.parametrize(
    "otherwise", [{"model_class": DenseLlama}, {"clip": 1e9}, {"model_class": DenseLlama, "clip": 1e9}], ids=str
)
def test_training_without_tvr_or_clipping_is_far_outside_of_what_is_tolerated(found: Found, otherwise: dict) -> None:
    other = densely(**{"model_class": WithTVR, "initial": found.of(FAST[0])[1]} | otherwise)
    for key, difference in differences(other, found.dense).items():
        assert difference > 20 * TOLERANCE[key], key


@pytest.mark.slow
def test_the_table(found: Found) -> None:
    print("\n" + table(found))


def table(found: Found) -> str:
    """Return the largest differences by ranks and parallel sizes, over all stages, offloading and accumulation."""
    rows = ["| ranks | tensor | sequence | layouts | loss | gradient norm | weights |", "|---|---|---|---|---|---|---|"]
    for key in sorted({(each.ranks, each.tensor, each.sequence) for each in EVERY}):
        these = [each for each in EVERY if (each.ranks, each.tensor, each.sequence) == key]
        largest = [f"{max(found.differences(each)[figure] for each in these):.1e}" for figure in TOLERANCE]
        rows.append(f"| {' | '.join([*map(str, key), str(len(these)), *largest])} |")
    return "\n".join(rows)
