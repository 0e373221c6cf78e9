"""Weight Scaling as Reparameterization (WeSaR): one deviation for all stored matrices, one trained factor for each.

    W̄ = α · W,    W ~ N(0, σ²),   α starts at σ_target / σ

This is done for every matrix, embeddings and head included. σ is the same for all of them. σ_target is the deviation that
He's or Small's initialization (`backbone`) would give this matrix, and 1 for the embedding with either. So W̄ starts as
with the backbone and a scaled embedding, while every stored W, and with it the size of Adam's relative steps, has the
same scale:

                     stored     α starts at           W̄ starts with
    embedding        σ          1 / σ                 1
    q, k, v, ...     σ          σ_backbone / σ        σ_backbone

α is a scalar in float32, trained like any weight, without weight decay. W̄ is computed in float32 and then cast, so the
fold is exact to the bit.

Source: Nishida et al. 2024 (arXiv 2410.05052), section 3, Table 1 and, for the embedding, section 5.3: all runs that they
compare have embedding scaling. The defaults are σ² = 4e-5 and He. The paper does not say whether α decays. Here it does
not, like every gain. In its Table 7 a frozen α is worse than a trained one.
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

from pretrain.methods.backbone import Backbone, backbone_rule, backbone_std
from pretrain.methods.base import EMBEDDING
from pretrain.methods.trained_factors import TrainedFactors
from pretrain.model.export_edits import LazyTensors, change, scale_final_norm
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import SCALE, Effective, Multiple
from pretrain.sharded import ShardedWeights
from pretrain.sharded.draws import Constant, Draw


class Gate(Effective):
    """W̄ = α W with a trained α."""

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return (1,)

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        assert scale is not None  # α is trained
        return weight * scale


class WeSaR(TrainedFactors):
    """WeSaR. Folds into the stock class by W ← α W.

    Attributes:
        variance: σ². The paper found 1e-5 to 4e-5 about equal.
        backbone: `he` or `small`.
        frozen: Keep α at its initial value.
    """

    decides: ClassVar[frozenset[str]] = TrainedFactors.decides | {EMBEDDING}
    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "embedding_scale": "wesar has a scaled embedding already, with either backbone: its factor of the embedding "
            "starts at 1 / the embedding's deviation"
        }
    )

    name: Literal["wesar"] = "wesar"
    variance: float = Field(4e-5, gt=0)
    backbone: Backbone = "he"
    frozen: bool = False

    def effective(self, matrix: Weight) -> Effective:
        return Multiple(self._alpha(matrix)) if self.frozen else Gate()

    def matrices(self) -> Mapping[str, Weight]:
        return self.run.matrices

    def init_std(self, weight: Weight) -> float | None:
        return sqrt(self.variance)

    def init_draw(self, weight: Weight) -> Draw | None:
        return Constant(self._alpha(self.matrix_of(weight))) if weight.role == "scale" else None

    def init_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            matrix = self.matrix_of(weight)
            target = "1" if _is_embedding(matrix) else backbone_rule(self.backbone, matrix, tied=False)
            return f"wesar: {target} / {sqrt(self.variance):.3g}"
        return f"wesar: {sqrt(self.variance):.3g}" if weight.fan_in else None

    def why_not_from_weights(self) -> str | None:
        if self.frozen and self.run.tied:
            return (
                "wesar with constant factors multiplies the one matrix of embedding and head by two of them, and a loaded "
                "model by one. Set wesar.frozen or model.tie_word_embeddings to false"
            )
        return None

    def take_over(self, weights: ShardedWeights) -> None:
        """Divide each matrix by α: its deviation over σ, so that all stored matrices have σ, or the constant if frozen."""
        stored = {f"{module}.weight": matrix for module, matrix in self.matrices().items()}
        stored = {name: matrix for name, matrix in stored.items() if name in weights.layout}
        if self.frozen:
            weights.rescale_({name: (1 / self._alpha(matrix), 0.0) for name, matrix in stored.items()})
            return
        sigma = sqrt(self.variance)
        alpha = {name: (moments.std or sigma) / sigma for name, moments in weights.moments(stored).items()}
        alpha["lm_head.weight"] = alpha[self.run.head]
        changes = {name: (1 / alpha[name], 0.0) for name in stored}
        changes |= {module + SCALE: (0.0, alpha[f"{module}.weight"]) for module in self.matrices()}
        weights.rescale_(changes)

    def forward_factor(self, weight: Weight) -> float | str | None:
        if not weight.fan_in:
            return None
        return self._alpha(weight) if self.frozen else weight.name.removesuffix(".weight") + SCALE

    def training_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            return "wesar: factor of its matrix"
        if not weight.fan_in:
            return None
        return "wesar: times a constant" if self.frozen else "wesar: times its scale"

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        scales = {module: None if self.frozen else tensors.pop(module + SCALE)() for module in self.matrices()}
        for module, matrix in self.matrices().items():
            if f"{module}.weight" in tensors:
                change(tensors, f"{module}.weight", partial(self.effective(matrix), scale=scales[module]))
        if self.run.tied:
            starts = {module: self._alpha(matrix) for module, matrix in self.matrices().items()}
            alpha = {module: starts[module] if scale is None else scale for module, scale in scales.items()}
            scale_final_norm(tensors, alpha["lm_head"] / alpha[self.run.embedding])
        return hf_config

    def fold_note(self) -> str | None:
        note = "each matrix is multiplied by its factor"
        if not self.run.tied:
            return note
        return f"{note}; the final norm's gain takes up the head's factor, as the tied matrix holds the embedding's"

    def _alpha(self, matrix: Weight) -> float:
        """Return the initial value of α."""
        target = 1.0 if _is_embedding(matrix) else backbone_std(self.backbone, matrix, self.run, tied=False)
        return target / sqrt(self.variance)


def _is_embedding(matrix: Weight) -> bool:
    """Return whether the residual stream starts as rows of this matrix: GPT-2 adds two of the same scale."""
    return matrix.role in ("embed", "position")
