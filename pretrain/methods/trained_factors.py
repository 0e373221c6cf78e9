"""The base of methods with trained factors beside stored matrices (`pretrain.model.reparameterization`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from pretrain.methods.base import FORM_OF_MATRICES, INITIAL_DEVIATIONS, Method
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import SCALE, Effective, Reparameterized, reparameterize
from pretrain.sharded import Moments, ShardedWeights
from pretrain.sharded.full import small_weights


class TrainedFactors(Method):
    """A method whose forward multiplies by a function of each stored matrix: of the blocks, unless `matrices` is overridden.

    A fold must remove the factors, `<module>.weight_scale`, from the exported tensors.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS, FORM_OF_MATRICES})
    tensor_parallel: ClassVar[bool] = False
    fold_order: ClassVar[int] = 0

    def effective(self, matrix: Weight) -> Effective:
        """Return a new function of this stored matrix and its factors."""
        raise NotImplementedError

    def matrices(self) -> Mapping[str, Weight]:
        """Return the matrices by the names of their modules."""
        return {module: weight for module, weight in self.run.matrices.items() if weight.in_block_matrix}

    def matrix_of(self, scale: Weight) -> Weight:
        """Return the matrix that factors belong to."""
        return self.run.matrices[scale.name.removesuffix(SCALE)]

    def transform(self, model: torch.nn.Module) -> None:
        for module, matrix in self.matrices().items():
            reparameterize(model, module, self.effective(matrix))

    def prepare(self, weights: ShardedWeights) -> None:
        follow_masters(weights)

    def follow(self, weights: ShardedWeights) -> None:
        follow_masters(weights)

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        follow_masters(weights)
        return {}


def factor_to(std: float, matrix: torch.Tensor) -> float:
    """Return the factor that gives a matrix this standard deviation, 1 where all its elements are equal."""
    return std / (Moments.of(matrix).std or std)


def follow_masters(weights: ShardedWeights) -> None:
    """Give forward the float32 values of all trained factors. Collective, except where forward computes in float32."""
    rounded = {
        name + SCALE: module
        for name, module in weights.engine.module.named_modules()
        if isinstance(module, Reparameterized)
        and module.weight_scale is not None
        and module.weight_scale.dtype != torch.float32
    }
    if not rounded:
        return
    for name, value in small_weights(weights, rounded).items():
        rounded[name].exact_scale = value
