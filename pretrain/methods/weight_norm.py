"""Weight normalization: the length of each row of a matrix is trained apart from its direction.

    W̄_i = g_i · w_i / ‖w_i‖      w_i: all weights of output i;   W ~ N(0, σ²),   g_i starts at σ_target √fan_in

This is done for the matrices of the blocks, and gradients flow through the norm. σ_target is the deviation that He's or
Small's initialization (`backbone`) would give the matrix. W̄ starts with it, exactly in every row. The gains, one for each
output, are trained in float32 without weight decay. W̄ is computed in float32 and then cast, and the norm is summed in
float64. So the number of threads and the kernels have no effect on it, and the fold is exact to the bit.

Embeddings and head are plain, with the backbone's deviation, because a row there is a token, and its length depends on
how frequent the token is.

Source: Salimans and Kingma 2016 (arXiv 1602.07868), who set g from the first batch. For transformers: Nishida et
al. 2024 (arXiv 2410.05052), Tables 6 and 12, who normalize embeddings and head too. The default σ² = 16e-5 is their best
of 1, 4, 16, 64 and 256e-5 at 1.3B. Their factors start as in each method's own paper (section 5.3, appendix C.1), so g
from the first batch. Here g starts at the backbone's scale, as in `wesar`, a number that follows from the run file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from pretrain.errors import UserError
from pretrain.methods.backbone import Backbone, backbone_rule, backbone_std
from pretrain.methods.trained_factors import TrainedFactors, factor_to
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import SCALE, Effective, applied
from pretrain.sharded import ShardedWeights, gathered
from pretrain.sharded.draws import Constant, Draw


class RowGains(Effective):
    """W̄_i = g_i w_i / ‖w_i‖."""

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return (outputs,)

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None  # g is trained
        lengths = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64).float()
        return weight * (scale[:, None] / lengths)


class WeightNorm(TrainedFactors):
    """Weight normalization. Folds into the stock class by w_i ← g_i w_i / ‖w_i‖.

    Attributes:
        variance: σ². Only its ratio to the learning rate matters, which decides how fast rows turn.
        backbone: `he` (with an embedding of deviation 1) or `small` (then `embedding_scale` with `rule: inverse_std`
            scales the embedding as the paper does).
    """

    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "tvr": "tvr rescales the stored matrix, and weight_norm divides it by its own norms, so tvr would do nothing to "
            "the model",
        }
    )
    discouraged: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "layernorm_scaling": "weight_norm lets the residual branches start smaller, for the sake of depth, and "
            "LayerNorm Scaling does best without that",
        }
    )

    name: Literal["weight_norm"] = "weight_norm"
    variance: float = Field(16e-5, gt=0)
    backbone: Backbone = "he"

    def effective(self, matrix: Weight) -> Effective:
        return RowGains()

    def init_std(self, weight: Weight) -> float | None:
        if weight.in_block_matrix:
            return sqrt(self.variance)
        return backbone_std(self.backbone, weight, self.run, self.run.tied)

    def init_draw(self, weight: Weight) -> Draw | None:
        if weight.role != "scale":
            return None
        matrix = self.matrix_of(weight)
        return Constant(backbone_std(self.backbone, matrix, self.run, self.run.tied) * sqrt(matrix.fan_in))

    def init_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            return f"weight_norm: {backbone_rule(self.backbone, self.matrix_of(weight), self.run.tied)} x sqrt(fan_in)"
        if weight.in_block_matrix:
            return f"weight_norm: {sqrt(self.variance):.3g}"
        return f"weight_norm: {backbone_rule(self.backbone, weight, self.run.tied)}" if weight.fan_in else None

    def take_over(self, weights: ShardedWeights) -> None:
        """Give each gain the length of its row, and each matrix the deviation σ."""
        gains = {}
        matrices = {matrix.name: matrix for matrix in self.matrices().values()}
        for name, full in gathered(weights, matrices):
            rows = full.T if matrices[name].input_major else full
            lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            if not bool(lengths.all()):
                raise UserError(
                    f"{name} has a row of zeros (output {int(lengths.argmin())}), and weight_norm divides each row by its "
                    "length. Start from other weights, or train without weight_norm."
                )
            gains[name.removesuffix(".weight") + SCALE] = lengths.float()
            full.mul_(factor_to(sqrt(self.variance), full))
        for name, full in gathered(weights, gains):
            full.copy_(gains[name])

    def training_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            return "weight_norm: length of each row of its matrix"
        return "weight_norm: each row of unit length, times its scale" if weight.in_block_matrix else None

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        for module, matrix in self.matrices().items():
            gains = tensors.pop(module + SCALE)()
            made = partial(applied, self.effective(matrix), scale=gains, input_major=matrix.input_major)
            change(tensors, matrix.name, made)
        return hf_config

    def fold_note(self) -> str | None:
        return "each row of the blocks' matrices is scaled to the length that its gain gives"
