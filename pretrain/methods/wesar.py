"""Weight Scaling as Reparameterization (WeSaR): one deviation for all stored matrices, one trained factor for each.

    W̄ = α · W,    W ~ N(0, σ²),   α starts at σ_target / σ

for every matrix, embeddings and head included; σ is the same for all of them, σ_target is what He's or Small's
initialization (`backbone`) would give this matrix. So W̄ starts as with the backbone, while every stored W, and with it
the size of Adam's relative steps, has the same scale. α is a scalar in float32, trained like any weight, without weight
decay; W̄ is computed in float32 and then cast, so the fold is exact to the bit.

Source: Nishida et al. 2024 (arXiv 2410.05052), section 3 and Table 1. Defaults: σ² = 4e-5, He. The paper does not say
whether α decays; it does not here, like every gain. In its Table 7 a frozen α is worse than a trained one.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig

from pretrain.folding import change, scale_final_norm
from pretrain.layout import Weight
from pretrain.methods.base import EMBEDDING, FORM_OF_MATRICES, INITIAL_DEVIATIONS, LazyTensors, Method, RunFacts
from pretrain.methods.he_init import he_rule, he_std
from pretrain.methods.small_init import small_rule, small_std
from pretrain.reparameterization import Effective, Multiple, follow_masters, reparameterize
from pretrain.sharded import ShardedWeights
from pretrain.sharded.draws import Constant, Draw

SCALE = ".weight_scale"
Backbone = Literal["he", "small"]


def backbone_std(backbone: Backbone, weight: Weight, run: RunFacts) -> float:
    """The deviation that He's or Small's initialization would give this matrix."""
    return he_std(weight, run.layers) if backbone == "he" else small_std(weight, run.hidden_size, run.layers)


def backbone_rule(backbone: Backbone, weight: Weight) -> str:
    """`backbone_std` in words."""
    return (he_rule if backbone == "he" else small_rule)(weight)


class Gate(Effective):
    """W̄ = α W with a trained α."""

    def scale_shape(self, outputs: int) -> tuple[int, ...]:
        return (1,)

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return weight * scale


class WeSaR(Method):
    """WeSaR; folds into the stock class by W ← α W.

    variance: σ². The paper found 1e-5 to 4e-5 about equal. backbone: `he` (with an embedding of deviation 1) or `small`.
    frozen: keep α as it starts.
    """

    decides: ClassVar[frozenset[str]] = frozenset({INITIAL_DEVIATIONS, FORM_OF_MATRICES, EMBEDDING})
    tensor_parallel: ClassVar[bool] = False
    fold_order: ClassVar[int] = 0

    name: Literal["wesar"] = "wesar"
    variance: float = Field(4e-5, gt=0)
    backbone: Backbone = "he"
    frozen: bool = False

    def transform(self, model: torch.nn.Module) -> None:
        for module in self.run.matrices:
            reparameterize(model, module, self._gate(module))

    def init_std(self, weight: Weight) -> float | None:
        return sqrt(self.variance)

    def init_draw(self, weight: Weight) -> Draw | None:
        return Constant(self._alpha(weight.name.removesuffix(SCALE))) if weight.role == "scale" else None

    def init_rule(self, weight: Weight) -> str | None:
        if weight.role == "scale":
            rule = backbone_rule(self.backbone, self.run.matrices[weight.name.removesuffix(SCALE)])
            return f"wesar: {rule} / {sqrt(self.variance):.3g}"
        return f"wesar: {sqrt(self.variance):.3g}" if weight.fan_in else None

    def forward_factor(self, weight: Weight) -> float | str | None:
        if not weight.fan_in:
            return None
        module = weight.name.removesuffix(".weight")
        return self._alpha(module) if self.frozen else module + SCALE

    def training_rule(self, weight: Weight) -> str | None:
        return ("wesar: times a constant" if self.frozen else "wesar: times its scale") if weight.fan_in else None

    def prepare(self, weights: ShardedWeights) -> None:
        follow_masters(weights)

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        follow_masters(weights)
        return {}

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        scales = {module: self._folded_scale(tensors, module) for module in self.run.matrices}
        for module, scale in scales.items():
            if f"{module}.weight" in tensors:
                change(tensors, f"{module}.weight", partial(self._gate(module), scale=scale))
        if self.run.tied:
            alpha = {module: self._alpha(module) if scales[module] is None else scales[module] for module in scales}
            scale_final_norm(tensors, alpha["lm_head"] / alpha[self.run.embedding])
        return hf_config

    def fold_note(self) -> str | None:
        tied = "; the final norm's gain takes up the head's factor, as the tied matrix holds the embedding's"
        return "each matrix is multiplied by its factor" + (tied if self.run.tied else "")

    def _gate(self, module: str) -> Effective:
        return Multiple(self._alpha(module)) if self.frozen else Gate()

    def _folded_scale(self, tensors: LazyTensors, module: str) -> torch.Tensor | None:
        return None if self.frozen else tensors.pop(module + SCALE)()

    def _alpha(self, module: str) -> float:
        """How α starts."""
        return backbone_std(self.backbone, self.run.matrices[module], self.run) / sqrt(self.variance)
