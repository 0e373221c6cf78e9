"""Target Variance Rescaling (TVR): hold the standard deviation of every block matrix at a target while training.

Every `interval_steps` optimizer steps, for each matrix W of the decoder blocks with mean m and standard deviation s
(Bessel's, over the FULL matrix, in float64):

    if s / σ_t > ratio_threshold:   W ← (W − m) · σ_t / s + m,   σ_t = target_std  or  target_std / √l

The mean and the optimizer's moments do not change. A smaller deviation is left as it is unless `two_sided`. Both the fp32
master and the working copy change, because under DeepSpeed a change of the working copy alone is undone by the next
optimizer step. W is the matrix that forward multiplies by. Where another method multiplies the stored matrix by a factor
α in forward, the stored one is rescaled by the same ratio as soon as |α| s is too large.

The target may also be given relative to where the deviation would end if nothing held it. AdamW's updates of noisy
gradients are a random walk with steps of one learning rate, and weight decay λ pulls it back:

    s² ← s² (1 − lr_t λ)² + lr_t²    over all steps t of the run, from the initial s²

Source: Owen et al. 2025 (arXiv 2503.17500) and its release. The release differs in this: it counts its interval from the
first step after a start, so with 5 it acts after steps 6, 11, 16, ..., and after others once it was resumed. It wipes the
bias of a rescaled module, computes in the storage dtype, and does nothing under ZeRO. Relative targets and their warmup
are Evenkeel's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from math import inf, sqrt
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.errors import UserError
from pretrain.methods.base import Method
from pretrain.model.layout import MATRIX_ROLES, MatrixRole, Weight
from pretrain.sharded import GatheredWeights, ShardedWeights
from pretrain.sharded.moments import require_finite

_ALTERNATIVES = {"target_std": "relative_target", "interval_steps": "interval_tokens"}  # only one of each pair is given


class TVR(Method):
    """TVR after optimizer steps. The weights stay plain, so nothing is left to fold.

    Attributes:
        target_std: σ_t. The paper's best 1B run used 0.01, about 0.4 of the free-running deviation of its schedule. A
            short run may never reach it, see docs/methods/tvr.md.
        relative_target: Instead of `target_std`: σ_t as a share of the free-running deviation that the learning rates
            predict.
        target_warmup_steps: Steps over which σ_t moves linearly from the initial deviation of each matrix to its target.
        ratio_threshold: Rescale if s / σ_t is above it. The release uses 1.2, the paper's curves suggest 1.
        interval_steps: Act when the global step is a multiple of it, so a resumed run acts on the same steps.
        interval_tokens: Instead of `interval_steps`: as many steps as train on so many tokens.
        scale_with_depth: Divide the target by √l. The paper found that it hurts.
        two_sided: Also raise deviations below target / ratio_threshold.
        roles: Which block matrices, at least one. All of them by default.
        exclude: Full names of weights that are not rescaled.
        zero_bias: Zero the bias beside a rescaled matrix, as the release does.
        engine: `sharded` (local arithmetic, one small collective) or `gathered` (full weights through DeepSpeed's hooks).
    """

    name: Literal["tvr"] = "tvr"
    target_std: float | None = Field(0.01, gt=0)
    relative_target: float | None = Field(None, gt=0)
    target_warmup_steps: int = Field(0, ge=0)
    ratio_threshold: float = Field(1.2, ge=1)
    interval_steps: int | None = Field(50, gt=0)
    interval_tokens: float | None = Field(None, gt=0, allow_inf_nan=False)
    scale_with_depth: bool = False
    two_sided: bool = False
    roles: tuple[MatrixRole, ...] = MATRIX_ROLES
    exclude: tuple[str, ...] = ()
    zero_bias: bool = False
    engine: Literal["sharded", "gathered"] = "sharded"

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, options: Any) -> Any:
        """Remove the default of an option whose alternative is given."""
        if not isinstance(options, Mapping):
            return options
        given = {name for name, value in options.items() if value is not None}
        for default, alternative in _ALTERNATIVES.items():
            if {default, alternative} <= given:
                raise ValueError(f"give either {default} or {alternative}, not both")
            if default in options and not given & {default, alternative}:
                raise ValueError(f"{default} null needs {alternative}")
        return dict(options) | {default: None for default, other in _ALTERNATIVES.items() if other in given}

    @field_validator("roles")
    @classmethod
    def _some(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        if not roles:
            raise ValueError("without a role there is nothing to hold: name some, or leave the key out for all of them")
        return roles

    @property
    def interval(self) -> int:
        """The number of steps from one application to the next."""
        if self.interval_steps is not None:
            return self.interval_steps
        assert self.interval_tokens is not None  # one of the two is given
        return max(1, round(self.interval_tokens / self.run.tokens_per_step))

    def applies_to(self, weight: Weight) -> bool:
        """Return whether this matrix is held at the target."""
        return weight.in_block_matrix and weight.role in self.roles and weight.name not in self.exclude

    def target(self, weight: Weight, step: int, factor: float = 1.0) -> float:
        """Return the target of the stored matrix's standard deviation at an optimizer step.

        Args:
            weight: the matrix.
            step: the optimizer step, counted from 1.
            factor: α, the factor that forward multiplies the stored matrix by.
        """
        if self.relative_target is not None:
            final = self.relative_target * self.free_running(weight)
        else:
            assert self.target_std is not None  # one of the two is given
            final = self.target_std / abs(factor) if factor else inf
        if self.scale_with_depth:
            final /= sqrt(weight.depth)
        if step >= self.target_warmup_steps:
            return final
        initial = self.run.initial_std(weight)
        return initial + (final - initial) * step / self.target_warmup_steps

    def passes_threshold(self, std: float, target: float) -> bool:
        """Return whether a matrix is rescaled: its standard deviation is too far from its target."""
        ratio = std / target
        return ratio > self.ratio_threshold or (self.two_sided and 0.0 < ratio < 1.0 / self.ratio_threshold)

    def free_running(self, weight: Weight) -> float:
        """Return the predicted standard deviation of this stored matrix at the end of the run if nothing holds it."""
        kept, added = _random_walk(self.run.learning_rate, self.run.total_steps, self.run.weight_decay(weight))
        return sqrt(kept * self.run.initial_std(weight) ** 2 + added)

    def why_not_from_weights(self) -> str | None:
        given = {
            "relative_target": self.relative_target is not None,
            "target_warmup_steps": self.target_warmup_steps > 0,
        }
        option = next((name for name, is_given in given.items() if is_given), None)
        return option and (
            f"tvr.{option} reckons with the deviation that a matrix is drawn with, and matrices are loaded here. Give "
            "tvr.target_std alone"
        )

    def check(self, weights: list[Weight]) -> None:
        names = {weight.name for weight in weights}
        if unknown := sorted(set(self.exclude) - names):
            near = [*dict.fromkeys(near for name in unknown for near in get_close_matches(name, names, 1))]
            raise UserError(
                f"methods: tvr.exclude names weights the model does not have: {', '.join(unknown)}."
                + (f" The nearest names are: {', '.join(near)}." if near else "")
            )
        if not any(self.applies_to(weight) for weight in weights):
            raise UserError(
                f"methods: tvr matches no weight. Its roles are {', '.join(self.roles)}; the model's block matrices are "
                f"{', '.join(sorted({w.role for w in weights if w.in_block_matrix}))}."
            )
        if self.relative_target is not None and self.run.optimizer != "adamw":
            raise UserError(
                f"methods: tvr.relative_target predicts the deviations that AdamW leads to, and optim.name is "
                f"{self.run.optimizer}. Give target_std: 0.3 to 0.5 of what a run without TVR ends with."
            )

    def prepare(self, weights: ShardedWeights) -> None:
        self._arithmetic(weights)

    def after_step(self, step: int, weights: ShardedWeights) -> dict[str, dict[str, float | bool]]:
        """Rescale the matrices that pass the threshold, if the step is a multiple of the interval. Collective.

        Returns:
            For each matrix: `std` and `mean` of the stored one before a rescale, its `target`, the `threshold` (with
            `two_sided` also the `lower_threshold`) that its deviation is compared with, and whether it was `rescaled`.
        """
        if step % self.interval:
            return {}
        arithmetic = self._arithmetic(weights)
        chosen = [weight for weight in arithmetic.layout.values() if self.applies_to(weight)]
        factors = {weight.name: self.run.forward_factor(weight) for weight in chosen}
        trained = {factor for factor in factors.values() if isinstance(factor, str)}
        moments = arithmetic.moments([*factors, *sorted(trained)])
        require_finite(moments, f"at step {step} (found by tvr)")
        measurements: dict[str, dict[str, float | bool]] = {}
        changes: dict[str, tuple[float, float]] = {}
        for weight in chosen:
            factor, std, mean = factors[weight.name], moments[weight.name].std, moments[weight.name].mean
            target = self.target(weight, step, moments[factor].mean if isinstance(factor, str) else factor)
            rescaled = self.passes_threshold(std, target)
            measurements[weight.name] = {"std": std, "mean": mean, **self._limits(target), "rescaled": rescaled}
            if rescaled:
                scale = target / std
                changes[weight.name] = (scale, mean * (1.0 - scale))
                changes.update(self._zeroed_bias(weight, arithmetic.layout))
        arithmetic.rescale_(changes)
        return measurements

    def training_rule(self, weight: Weight) -> str | None:
        if not self.applies_to(weight):
            return None
        of_product = " of αW" if self.relative_target is None and self.run.forward_factor(weight) != 1 else ""
        low = f" or below 1/{self.ratio_threshold:g}x" if self.two_sided else ""
        above = f"std{of_product} above {self.ratio_threshold:g}x{low}"
        return f"tvr: {above} -> {self._target_rule(weight)}, every {self.interval} steps"

    def _target_rule(self, weight: Weight) -> str:
        depth = " / sqrt(l)" if self.scale_with_depth else ""
        warmup = f" from step {self.target_warmup_steps} on" if self.target_warmup_steps else ""
        if self.relative_target is None:
            return f"{self.target_std:g}{depth}{warmup}"
        return f"{self.relative_target:g} x {self.free_running(weight):.2g}{depth}{warmup}"

    def _arithmetic(self, weights: ShardedWeights) -> ShardedWeights | GatheredWeights:
        """Return the weights as the option `engine` reads and writes them."""
        return weights if self.engine == "sharded" else GatheredWeights(weights.engine)

    def _limits(self, target: float) -> dict[str, float]:
        """Return the target and the deviations from which a matrix is rescaled, as the report shows them."""
        limits = {"target": target, "threshold": target * self.ratio_threshold}
        if self.two_sided:
            limits["lower_threshold"] = target / self.ratio_threshold
        return limits

    def _zeroed_bias(self, weight: Weight, layout: dict[str, Weight]) -> dict[str, tuple[float, float]]:
        """Return the change of the bias beside a rescaled matrix, if `zero_bias` wants one."""
        bias = weight.name.removesuffix("weight") + "bias"
        return {bias: (0.0, 0.0)} if self.zero_bias and bias in layout else {}


@lru_cache(maxsize=16)
def _random_walk(learning_rate: Callable[[int], float], total_steps: int, weight_decay: float) -> tuple[float, float]:
    """Return (kept, added): over a whole run the recurrence above turns s² into kept · s² + added."""
    kept, added = 1.0, 0.0
    for step in range(1, total_steps + 1):
        lr = learning_rate(step)
        shrink = (1.0 - lr * weight_decay) ** 2
        kept, added = kept * shrink, added * shrink + lr**2
    return kept, added
