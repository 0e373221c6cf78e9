"""Sigma reparameterization (σReparam): a trained scalar is the spectral norm of each matrix of the blocks.

    W̄ = γ · W / σ,    σ = uᵀ W v,    W ~ N(0, `variance`)

The unit vectors u and v follow the leading singular vectors of W by power iteration: v ← Wᵀu, u ← Wv, each normalized.
An iteration runs once for each optimizer step, in the first forward pass of training after it. All micro-batches of a
step, recomputation in backward, evaluation and export use the same two vectors, so the model is one function of its
checkpoint. The vectors are float32, part of each checkpoint, and not parameters. Before the first step come 20 iterations
from a u of equal elements. σ is summed in float64. W̄ is computed in float32 and then cast, so the fold is exact to the
bit.

The gradient flows through σ, with u and v as constants, as in the paper. It then has no part along W, which could not
change W̄. Without that (`differentiate_sigma: false`, as in Nishida et al.) W drifts along itself.

Embeddings and head are plain. The norms before the blocks stay, so this is the "Pre-LN" variant. γ does not decay, like
other gains.

Source: Zhai et al. 2023 (arXiv 2303.06296) and apple/ml-sigma-reparam. The default variance, 64e-5, is the best of 1, 4,
16, 64 and 256e-5 at 1.3B in Nishida et al. 2024 (arXiv 2410.05052), who reparameterize embeddings and head too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from pretrain.errors import UserError
from pretrain.methods.trained_factors import TrainedFactors, factor_to
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import SCALE, Effective, applied
from pretrain.sharded import ShardedWeights, gathered

FIRST_ITERATIONS = 20
SETTLING_ITERATIONS, SETTLED = 500, 1e-6  # of loaded matrices, until an iteration changes σ by less than this share
CHUNK = 1 << 20  # elements that are converted to float64 at a time: 8 MB
_VECTORS = (".left_singular_vector", ".right_singular_vector")


class SpectralGate(Effective):
    """W̄ = γ W / σ, with the state that σ needs.

    Attributes:
        differentiate: let the gradient flow through σ.
        vectors: u (outputs,) and v (inputs,), float32. None before the first forward pass, `start` or `restore`.
        is_due: the next forward pass of training advances the vectors.
    """

    def __init__(self, differentiate: bool) -> None:
        self.differentiate = differentiate
        self.vectors: tuple[torch.Tensor, torch.Tensor] | None = None
        self.after_step()

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return (1,)

    def start(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find and return the first vectors for a matrix (outputs, inputs)."""
        left = unit(torch.ones(len(weight), device=weight.device))
        for _ in range(FIRST_ITERATIONS):
            left, right = power_iteration(weight, left)
        self.restore(left, right)
        return left, right

    def settle(self, weight: torch.Tensor) -> float:
        """Find first vectors near which an iteration hardly changes σ any more, and return σ.

        A trained matrix may need many iterations. With the first ones, σ would go on growing, and W̄ shrinking.
        """
        left, right = self.start(weight)
        sigma = float(spectral_norm(weight, left, right))
        for _ in range(SETTLING_ITERATIONS):
            before = sigma
            left, right = power_iteration(weight, left)
            sigma = float(spectral_norm(weight, left, right))
            if abs(sigma - before) <= SETTLED * sigma:
                break
        self.restore(left, right)
        return sigma

    def restore(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Continue from vectors that were stored after an optimizer step."""
        self.vectors = left, right
        self.after_step()

    def after_step(self) -> None:
        """Forget σ, because the weight has changed, and let the next forward pass of training advance the vectors."""
        self.is_due = True
        self.forget_sigma()

    def forget_sigma(self) -> None:
        """Let the next forward pass compute σ, of the weight that it finds, with the same vectors."""
        self._sigma: torch.Tensor | None = None

    def advance(self, weight: torch.Tensor) -> None:
        if self.is_due:
            left, _ = self._vectors_near(weight)
            self.vectors = power_iteration(weight, left)
            self.is_due, self._sigma = False, None

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None  # γ is trained
        left, right = self._vectors_near(weight)
        if self._sigma is None:
            self._sigma = spectral_norm(weight, left, right)
        sigma = _SpectralNorm.apply(weight, self._sigma, left, right) if self.differentiate else self._sigma
        return weight * (scale / sigma)

    def _vectors_near(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return u and v on the device of `weight`."""
        left, right = self.start(weight) if self.vectors is None else self.vectors
        self.vectors = left.to(weight.device), right.to(weight.device)
        return self.vectors


class _SpectralNorm(torch.autograd.Function):
    """A σ that is computed already, with its gradient dσ/dW = u vᵀ."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, sigma: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return sigma.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        return torch.outer(gradient * left, right), None, None, None


@torch.no_grad()
def power_iteration(weight: torch.Tensor, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next u (outputs,) and v (inputs,), float32, for a matrix (outputs, inputs) in any precision."""
    right = unit(_product(weight.T, left))
    return unit(_product(weight, right)), right


@torch.no_grad()
def spectral_norm(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return uᵀ W v, a float32 scalar."""
    return (left.double() @ _product(weight, right)).float()


def unit(vector: torch.Tensor) -> torch.Tensor:
    """Return `vector` with length 1, float32."""
    return (vector.double() / torch.linalg.vector_norm(vector.double())).float()


def _product(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return matrix @ vector in float64, which rounds so little that the order of sums has no effect in float32."""
    rows, vector = max(1, CHUNK // matrix.shape[1]), vector.double()
    return torch.cat([some.double() @ vector for some in matrix.split(rows)])


class SigmaReparam(TrainedFactors):
    """σReparam. Folds into the stock class by W ← γ W / σ.

    Attributes:
        variance: σ² of the stored matrices. Only its ratio to the learning rate matters.
        initial_scale: γ starts at `one`, as in the paper, or at the `spectral_norm` of the matrix, as in its release, so
            that W̄ starts as W with this variance.
        differentiate_sigma: Let the gradient flow through σ.
    """

    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "tvr": "tvr rescales the stored matrix, and sigma_reparam divides it by its spectral norm, so tvr would do "
            "nothing to the model"
        }
    )

    eager_blocks: ClassVar[str | None] = "its spectral norms are computed in the first forward pass of each step only"

    name: Literal["sigma_reparam"] = "sigma_reparam"
    variance: float = Field(64e-5, gt=0)
    initial_scale: Literal["one", "spectral_norm"] = "one"
    differentiate_sigma: bool = True

    def effective(self, matrix: Weight) -> SpectralGate:
        return SpectralGate(self.differentiate_sigma)

    def init_std(self, weight: Weight) -> float | None:
        return sqrt(self.variance) if weight.in_block_matrix else None

    def init_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale" and self.initial_scale == "spectral_norm":
            return "sigma_reparam: spectral norm of the drawn matrix"
        return f"sigma_reparam: {sqrt(self.variance):.3g}" if weight.in_block_matrix else None

    def training_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            return "sigma_reparam: spectral norm of what forward multiplies by"
        return "sigma_reparam: times its scale / spectral norm" if weight.in_block_matrix else None

    def take_over(self, weights: ShardedWeights) -> None:
        """Set γ to the spectral norm of each matrix, whatever `initial_scale` says, and give the matrix its deviation."""
        gates = {f"{module}.weight": gate for module, gate in self._gates(weights.engine.module)}
        gammas = {}
        for name, full in gathered(weights, gates):
            if not bool(full.any()):
                raise UserError(
                    f"{name} holds only zeros, and sigma_reparam divides it by its spectral norm. Start from other weights, "
                    "or train without sigma_reparam."
                )
            factor = factor_to(sqrt(self.variance), full)
            full.mul_(factor)
            matrix = full.T if weights.layout[name].input_major else full
            gammas[name.removesuffix(".weight") + SCALE] = (0.0, gates[name].settle(matrix) / factor)
        weights.rescale_(gammas)

    def prepare(self, weights: ShardedWeights) -> None:
        if self.initial_scale == "spectral_norm":
            self._start_at_spectral_norms(weights)
        super().prepare(weights)

    def follow(self, weights: ShardedWeights) -> None:
        for _, gate in self._gates(weights.engine.module):
            gate.forget_sigma()
        super().follow(weights)

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        for _, gate in self._gates(weights.engine.module):
            gate.after_step()
        return super().after_step(step, weights)

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return u and v of each matrix; nothing before the first forward pass."""
        return {
            module + name: vector
            for module, gate in self._gates(model)
            if gate.vectors is not None
            for name, vector in zip(_VECTORS, gate.vectors, strict=True)
        }

    def load_state(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Restore u and v of each matrix.

        Raises:
            UserError: where the checkpoint lacks a vector.
        """
        for module, gate in self._gates(model):
            if missing := [module + name for name in _VECTORS if module + name not in state]:
                raise UserError(
                    f"the checkpoint lacks {missing[0]}, so a run with sigma_reparam cannot go on from it. Start from "
                    "another checkpoint, or from scratch with --set checkpoint.resume=never."
                )
            gate.restore(*(state[module + name] for name in _VECTORS))

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        for module, matrix in self.matrices().items():
            gate, gamma = self.effective(matrix), tensors.pop(module + SCALE)()
            gate.restore(*(tensors.pop(module + name)() for name in _VECTORS))
            change(tensors, matrix.name, partial(applied, gate, scale=gamma, input_major=matrix.input_major))
        return hf_config

    def fold_note(self) -> str | None:
        return "the blocks' matrices are divided by their spectral norms and multiplied by their scales"

    def _start_at_spectral_norms(self, weights: ShardedWeights) -> None:
        """Set γ, which is 1, to σ wherever training has not begun. Collective."""
        new = {f"{module}.weight": gate for module, gate in self._gates(weights.engine.module) if gate.vectors is None}
        changes = {}
        for name, full in gathered(weights, new):
            matrix = full.T if weights.layout[name].input_major else full
            sigma = spectral_norm(matrix, *new[name].start(matrix))
            changes[name.removesuffix(".weight") + SCALE] = (float(sigma), 0.0)
        weights.rescale_(changes)

    def _gates(self, model: torch.nn.Module) -> list[tuple[str, SpectralGate]]:
        """Return the function of each matrix in `model`, after the name of its module."""
        return [(module, cast("SpectralGate", model.get_submodule(module).effective)) for module in self.matrices()]
