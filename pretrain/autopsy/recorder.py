"""The last steps of a run in numbers, kept on the device, from which autopsies are made.

Only `figures` waits for the device and communicates. Each rank keeps three numbers for each of its pieces of the weights.
They are put together when an autopsy needs them, which is rare.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.autopsy.update_norms import UpdateNorms
from pretrain.model.layout import Weight
from pretrain.monitor.activations import LargestActivations
from pretrain.sharded import ShardedWeights
from pretrain.sharded.collectives import all_gather
from pretrain.sharded.engine_protocol import Engine


@dataclass(frozen=True)
class _Record:
    """One step, as this rank has it. See `Recorder.end_step`.

    gradients, steps: as from `UpdateNorms`. activations: as from `LargestActivations`.
    """

    step: int
    samples: range
    losses: Mapping[str, torch.Tensor]
    lr: float
    factor: float
    gradients: torch.Tensor
    steps: torch.Tensor
    activations: torch.Tensor


@dataclass(frozen=True)
class Norms:
    """Norms of one weight at one step.

    Attributes:
        gradient: that of the gradient before clipping. None if it is not known: under ZeRO-1 and 2, for weights of Muon.
        step: that of the step, before methods edit the weight. None if it is not known: the optimizer cannot tell.
        weight: that of the weight after the step.
    """

    gradient: float | None
    step: float | None
    weight: float


@dataclass(frozen=True)
class StepFigures:
    """One step, from all ranks.

    Attributes:
        samples: the samples of the run's order that it read.
        losses: means over the batch by name, as in `StepResult`.
        factor: what the gate multiplied the gradient by, besides clipping by its norm. 0 for a skipped step.
        norms: the norms of each weight, by name.
        activations: the largest |h| after each block.
    """

    step: int
    samples: range
    losses: dict[str, float]
    lr: float
    factor: float
    norms: dict[str, Norms]
    activations: list[float]


class Recorder:
    """Keeps the newest step and the steps before it."""

    def __init__(self, engine: Engine, weights: ShardedWeights, steps: int) -> None:
        """Record the steps of `engine` and keep `steps` steps before the newest."""
        self.layout: dict[str, Weight] = weights.layout
        self._update_norms = UpdateNorms(weights)
        self._activations = LargestActivations(engine.module, engine.device)
        self._gradients: torch.Tensor | None = None
        self._records: deque[_Record] = deque(maxlen=steps + 1)

    @property
    def newest_step(self) -> int:
        """The step that was recorded last. There must be one."""
        return self._records[-1].step

    def gradients(self) -> None:
        """Record the gradients. Call it after the last backward of a step, before the engine's step drops them."""
        self._gradients = self._update_norms.gradient_squares()

    def end_step(self, step: int, samples: range, losses: Mapping[str, torch.Tensor], lr: float, factor: float) -> None:
        """Record a step. Call it after the engine's step, before anything else changes the weights.

        The arguments are those of `StepFigures`. `losses` are scalars on the device.
        """
        gradients = self._gradients
        assert gradients is not None, "`gradients` has been called during the step"
        steps = self._update_norms.step_squares() if factor else gradients.new_zeros(len(gradients), 2)
        self._records.append(_Record(step, samples, losses, lr, factor, gradients, steps, self._activations.take()))

    def forget(self) -> None:
        """Forget all steps, as when a run goes back to an earlier step."""
        self._records.clear()

    def figures(self) -> list[StepFigures]:
        """Return the recorded steps, the oldest first. There must be one. Collective."""
        records = list(self._records)
        activations = all_gather(torch.stack([record.activations for record in records])).amax(0).tolist()
        norms = self._norms(records)
        return [
            StepFigures(
                record.step,
                record.samples,
                {name: float(loss) for name, loss in record.losses.items()},
                record.lr,
                record.factor,
                of_weights,
                largest,
            )
            for record, of_weights, largest in zip(records, norms, activations, strict=True)
        ]

    def _norms(self, records: list[_Record]) -> list[dict[str, Norms]]:
        """Return the norms of the full weights at each step. Squares are summed over the ranks."""
        mine = torch.stack([torch.cat((record.gradients[:, None], record.steps), 1) for record in records])
        numbers = {name: number for number, name in enumerate(self.layout)}
        where = torch.tensor([numbers[name] for name in self._update_norms.names], device=mine.device)
        squares = mine.new_zeros(len(records), len(numbers), 3).index_add_(1, where, mine)
        if dist.get_backend() == "nccl":
            squares = squares.cuda()  # an offloaded optimizer keeps its pieces on the CPU
        dist.all_reduce(squares)
        return [
            {weight.name: self._known(weight, *each) for weight, each in zip(self.layout.values(), row, strict=True)}
            for row in squares.sqrt().tolist()
        ]

    def _known(self, weight: Weight, gradient: float, step: float, norm: float) -> Norms:
        gradient_known, step_known = self._update_norms.known(weight)
        return Norms(gradient if gradient_known else None, step if step_known else None, norm)
