"""Target Variance Rescaling (TVR): hold the standard deviation of every block matrix at a target while training.

Every `interval_steps` optimizer steps, for each matrix W of the decoder blocks with mean m and standard deviation s
(Bessel's, over the FULL matrix, in float64):

    if s / σ_t > ratio_threshold:   W ← (W − m) · σ_t / s + m,   σ_t = target_std  or  target_std / √l

The mean is kept, optimizer moments are left alone, a smaller deviation is left alone unless `two_sided`. Both the
fp32 master and the working copy change: under DeepSpeed a change of the working copy alone is undone by the next
optimizer step.

Source: Owen et al. 2025 (arXiv 2503.17500) and its release. Where the release differs: it re-bases its interval on
resume, wipes the bias of a rescaled module, computes in the storage dtype, and does nothing under ZeRO.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

from pydantic import Field

from pretrain.errors import UserError
from pretrain.layout import MATRIX_ROLES, Weight
from pretrain.methods.base import Method
from pretrain.sharded import GatheredWeights, ShardedWeights
from pretrain.sharded.moments import require_finite


class TVR(Method):
    """TVR after optimizer steps; the weights stay plain, so nothing is left to fold.

    target_std: σ_t. The paper's best 1B run used 0.01, about 0.4 of the free-running deviation of its schedule; a
        short run may never reach it, see docs/methods.md.
    ratio_threshold: rescale when s / σ_t exceeds it, strictly. The release uses 1.2; the paper's curves suggest 1.
    interval_steps: act when the global step is a multiple of it, so a resumed run acts on the same steps.
    scale_with_depth: divide the target by √l (the paper found that it hurts).
    two_sided: also raise deviations below target / ratio_threshold.
    roles: which block matrices; all of them by default.
    exclude: full weight names to leave alone.
    zero_bias: zero the bias beside a rescaled matrix, as the release does.
    engine: `sharded` (local arithmetic, one small collective) or `gathered` (full weights through DeepSpeed's hooks).
    """

    name: Literal["tvr"] = "tvr"
    target_std: float = Field(0.01, gt=0)
    ratio_threshold: float = Field(1.2, ge=1)
    interval_steps: int = Field(50, gt=0)
    scale_with_depth: bool = False
    two_sided: bool = False
    roles: tuple[Literal["q", "k", "v", "qkv", "o", "gate", "up", "down"], ...] = MATRIX_ROLES
    exclude: tuple[str, ...] = ()
    zero_bias: bool = False
    engine: Literal["sharded", "gathered"] = "sharded"

    def applies_to(self, weight: Weight) -> bool:
        """Whether this matrix is held at the target."""
        return weight.in_block_matrix and weight.role in self.roles and weight.name not in self.exclude

    def target(self, weight: Weight) -> float:
        """σ_t of this matrix."""
        return self.target_std / sqrt(weight.layer) if self.scale_with_depth else self.target_std

    def check(self, weights: list[Weight]) -> None:
        names = {weight.name for weight in weights}
        if unknown := set(self.exclude) - names:
            raise UserError(
                f"methods: tvr.exclude names weights the model does not have: {', '.join(sorted(unknown))}."
            )
        if not any(self.applies_to(weight) for weight in weights):
            raise UserError(
                f"methods: tvr matches no weight. Its roles are {', '.join(self.roles)}; the model's block matrices are "
                f"{', '.join(sorted({w.role for w in weights if w.in_block_matrix}))}."
            )

    def prepare(self, weights: ShardedWeights) -> None:
        self._reach(weights)

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        if step % self.interval_steps:
            return {}
        reached = self._reach(weights)
        chosen = [weight for weight in reached.layout.values() if self.applies_to(weight)]
        moments = reached.moments([weight.name for weight in chosen])
        require_finite(moments, f"at step {step} (found by tvr)")
        facts, changes = {}, {}
        for weight in chosen:
            std, mean = moments[weight.name].std, moments[weight.name].mean
            if rescaled := self._is_off_target(std, self.target(weight)):
                scale = self.target(weight) / std
                changes[weight.name] = (scale, mean * (1.0 - scale))
                changes.update(self._zeroed_bias(weight, reached.layout))
            facts[weight.name] = {"std": std, "mean": mean, "rescaled": rescaled}
        reached.rescale_(changes)
        return facts

    def step_rule(self, weight: Weight) -> str | None:
        if not self.applies_to(weight):
            return None
        target = f"{self.target_std:g}" + (" / sqrt(l)" if self.scale_with_depth else "")
        bound = f"above {self.ratio_threshold:g}x" + (
            f" or below 1/{self.ratio_threshold:g}x" if self.two_sided else ""
        )
        return f"tvr: std {bound} -> {target}, every {self.interval_steps} steps"

    def _reach(self, weights: ShardedWeights) -> ShardedWeights | GatheredWeights:
        return weights if self.engine == "sharded" else GatheredWeights(weights.engine)

    def _is_off_target(self, std: float, target: float) -> bool:
        ratio = std / target
        return ratio > self.ratio_threshold or (self.two_sided and 0.0 < ratio < 1.0 / self.ratio_threshold)

    def _zeroed_bias(self, weight: Weight, layout: dict[str, Weight]) -> dict[str, tuple[float, float]]:
        bias = weight.name.removesuffix("weight") + "bias"
        return {bias: (0.0, 0.0)} if self.zero_bias and bias in layout else {}
