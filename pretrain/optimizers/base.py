"""The contract of an optimizer: what the run file, DeepSpeed, checkpoints, the planner and autopsies must know of it.

An optimizer is one file in this folder. It holds an `Algorithm` under the name OPTIMIZER, and the class of torch optimizer
that takes the steps, unless a library has it. DeepSpeed replaces the parameters by flat tensors that hold this rank's
fp32 masters of many weights end to end, so the class must step any tensor, element by element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from pretrain.model.layout import Weight
from pretrain.values import Values

Cut = Callable[[torch.Tensor], list[torch.Tensor]]


class OptimKeys(Protocol):
    """The run's `optim` section, as an algorithm sees it. `own` are its own options, the section `optim.NAME`."""

    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def grad_clip(self) -> float | None: ...
    @property
    def zclip(self) -> Any: ...
    @property
    def own(self) -> Any: ...


@dataclass(frozen=True)
class Layout:
    """How a run's weights, gradients and state will be held.

    Attributes:
        stage: of ZeRO.
        precision: of the working copies: fp32, bf16 or fp16.
        accumulation: the dtype in which DeepSpeed accumulates gradients: fp32, bf16 or fp16.
        tensor_ranks: the ranks that tensor parallelism cuts the matrices among.
        zero: the zero_optimization block of DeepSpeed's JSON, as the user gave it.
    """

    stage: int
    precision: str
    accumulation: str
    tensor_ranks: int
    zero: Mapping[str, Any]


class Algorithm(ABC):
    """One optimizer. Override only what differs from AdamW's ways.

    Class attributes:

    - `name`: the value of `optim.name` that selects it.
    - `summary`: what steps which weights, in a few words.
    - `options`: the section `optim.NAME`, None where it has no options of its own.
    - `unused`: keys of `optim` that have no effect with it.
    - `moments`: the tensors that it keeps for each weight, of the weight's shape, by their names in torch's state, with the
      bytes of an element.
    - `zero_keys`: what DeepSpeed's zero_optimization block must hold.
    - `replaces_gradients`: whether DeepSpeed puts updates in the place of gradients while it averages them at ZeRO-1 and 2.
    - `compiles`: whether it compiles kernels on GPUs, which takes a C compiler on each node.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type[Values] | None] = None
    unused: ClassVar[tuple[str, ...]] = ()
    moments: ClassVar[Mapping[str, int]]
    zero_keys: ClassVar[Mapping[str, Any]] = {}
    replaces_gradients: ClassVar[bool] = False
    compiles: ClassVar[bool] = False

    @abstractmethod
    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """Return the class that `build` makes an instance of."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], optim: OptimKeys) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups with the options of `group_options`."""

    def of_weight(self, weight: Weight) -> Algorithm:
        """Return the algorithm that steps this weight in a run with this optimizer."""
        return self

    def of_group(self, group: Mapping[str, Any]) -> Algorithm:
        """Return the algorithm that steps the weights of a parameter group of this optimizer."""
        return self

    def bytes_of(self, weight: Weight) -> int:
        """Return the bytes that a run with this optimizer keeps for each element of a weight, besides the fp32 master."""
        return sum(self.of_weight(weight).moments.values())

    def peak_lr(self, optim: OptimKeys) -> float:
        """Return the highest learning rate of what this algorithm steps."""
        return optim.lr

    def decay_of_matrices(self, optim: OptimKeys) -> float:
        """Return the weight decay of the matrices that this algorithm steps, per unit of learning rate."""
        return optim.weight_decay

    def group_options(self, weight: Weight, optim: OptimKeys, weight_decay: float) -> dict[str, Any]:
        """Return the options of the parameter group of a weight, which may include `lr_scale`.

        Args:
            weight: the weight.
            optim: the run's `optim` section.
            weight_decay: its weight decay, per unit of learning rate.

        Returns:
            torch's options of a group. The learning rate of a step is multiplied by `lr_scale`, if it is among them.
        """
        return {"weight_decay": weight_decay}

    def decays(self, optim: OptimKeys) -> Iterator[tuple[str, float, float]]:
        """Yield each weight decay of a run with the key of `optim` that sets it and the learning rate that multiplies it."""
        yield "weight_decay", optim.lr, optim.weight_decay

    def faults(self, optim: OptimKeys) -> Iterator[str]:
        """Yield what is wrong with the `optim` section, besides values out of range, for this optimizer."""
        yield from ()

    def refusals(self, layout: Layout) -> Iterator[str]:
        """Yield why a layout is refused, each time with what to do instead."""
        yield from ()

    def directions(
        self, tensor: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any], cut: Cut
    ) -> list[torch.Tensor] | None:
        """Read the last step back: return U, where the step was W <- (1 - h d) W - h U.

        h is the group's learning rate and d its weight decay. Called right after a step, while the gradient is in place.
        It must not wait for the device and must not raise, whatever the state holds.

        Args:
            tensor: the flat tensor that was stepped.
            state: the optimizer's state of it.
            group: its parameter group.
            cut: maps a tensor of its layout to views of the parts that are asked for.

        Returns:
            A tensor of new memory for each part, float32. None if the step cannot be read back.
        """
        return None
