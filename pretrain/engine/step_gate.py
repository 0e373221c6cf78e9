"""Decides between DeepSpeed's gradients and the optimizer whether a step is taken, with the same result on every rank.

DeepSpeed reduces the gradients, takes their global norm, clips, and calls the step of the optimizer that it was given:
once for each sub-group of weights (ZeRO-3), each parameter group (ZeRO-1 and 2), or all weights. The gate stands in for
that call. At the first one of a step it decides from the mean loss and the norm, which all ranks have in common:

    taken      the optimizer steps on DeepSpeed's gradient
    clipped    on the gradient times a factor below 1
    left out   the optimizer is not called: masters, moments and step counters stay what they were, bit for bit

DeepSpeed then drops the gradients and copies masters to working copies, as after every step.

Where the norm is not finite DeepSpeed leaves the step out by itself, except in fp32 without ZeRO, and in bf16 at ZeRO-2
as `check_grad_overflow` is off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, NamedTuple

import torch

from pretrain.engine.gradient_norm import GradientNorm, Norm
from pretrain.optim.zclip import ZClip
from pretrain.resilience.spike_guard import SpikeGuard, StepVerdict
from pretrain.sharded.engine_protocol import Engine


@dataclass(frozen=True)
class Decision:
    """The decision on one step.

    Attributes:
        verdict: the guard's finding, or `overflow`.
        norm: of the global gradient, before any clipping. None where DeepSpeed takes none (Muon's at ZeRO-1 and 2),
            infinite where it is not finite.
        factor: the gate multiplies the gradient by it after DeepSpeed's own clipping; 0 if the step is left out.
    """

    verdict: StepVerdict
    norm: float | None
    factor: float


class _Expected(NamedTuple):
    """The step that the engine is about to take."""

    step: int
    loss: torch.Tensor
    loss_scale: float


class StepGate:
    """The gate of one engine. Every rank must make one, and take every step from then on through `train_step`.

    Attributes:
        watchers: called when a step is about to be taken, while its gradients are whole: neither clipped nor rejected.
    """

    def __init__(self, engine: Engine, guard: SpikeGuard, zclip: ZClip | None = None) -> None:
        """Stand in for the step of the engine's optimizer; `guard` and `zclip` decide."""
        self.engine, self.guard, self.zclip = engine, guard, zclip
        self.watchers: list[Callable[[], None]] = []
        self._expected: _Expected | None = None
        self._decision: Decision | None = None
        optimizer = engine.basic_optimizer
        self._optimizer_step = optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign, assignment]  # DeepSpeed calls it by this name
        self._norm = GradientNorm(engine, may_move=lambda norm: self._decide(norm).factor != 0.0)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to make the same decisions, bit for bit: JSON numbers."""
        return {"guard": self.guard.state(), "zclip": self.zclip.state() if self.zclip else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the `state` of an earlier gate. An empty one, or one that lacks a part, is that of a new run."""
        self.guard.load_state(state.get("guard", {}))
        if self.zclip:
            self.zclip.load_state(state.get("zclip", {}))

    def rolled_back(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that holds `state`."""
        self.guard.rolled_back(state.get("guard", {}))
        if self.zclip:
            self.zclip.load_state(state.get("zclip", {}))

    def expect(self, step: int, loss: torch.Tensor, loss_scale: float) -> None:
        """Prepare for the engine's step number `step`, of mean loss `loss`, with gradients at `loss_scale`."""
        self._expected, self._decision = _Expected(step, loss, loss_scale), None
        self._norm.forget()
        if scaler := getattr(self.engine.optimizer, "loss_scaler", None):
            scaler.raise_error_at_min_scale = False  # a step that overflows there is the guard's
        for watch in self.watchers:
            watch()

    def passed(self) -> Decision:
        """Return the decision on the expected step, after the engine has taken it or left it out."""
        decision = self._decide(inf)  # unless the optimizer was called: then DeepSpeed has left the step out by itself
        self._expected = None
        return decision

    def _step(self) -> None:
        """Stand in for the optimizer's step, which DeepSpeed calls with the gradients of some weights in place."""
        factor = self._decide(self._norm.measured(self._due.loss_scale)).factor
        if factor == 0.0:
            return
        if factor < 1.0:
            for group in self.engine.basic_optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        self._optimizer_step()

    def _decide(self, norm: Norm) -> Decision:
        """Decide on the expected step; the first decision stands."""
        if self._decision is None:
            self._decision = self._decision_by(*_read(self._due.loss, norm))
        return self._decision

    def _decision_by(self, loss: float, norm: float | None) -> Decision:
        verdict = self._judge(self._due.step, loss, norm, self._due.loss_scale)
        if verdict.skip:
            return Decision(verdict, norm, factor=0.0)
        if self.zclip is None or norm is None:  # a run with Muon has no ZClip
            return Decision(verdict, norm, factor=1.0)
        return Decision(verdict, norm, self._zclip_factor(self.zclip, norm))

    def _judge(self, step: int, loss: float, norm: float | None, loss_scale: float) -> StepVerdict:
        if norm == inf and isfinite(loss) and self._scale_can_fall(loss_scale):
            return StepVerdict(
                "overflow", skip=True, reason=f"fp16 gradients overflowed at the loss scale {loss_scale:g}"
            )
        return self.guard.assess(step, loss, norm)

    def _scale_can_fall(self, loss_scale: float) -> bool:
        engine = self.engine
        if not (engine.fp16_enabled() and engine.dynamic_loss_scale()):
            return False
        return loss_scale > engine._config.float16_config.min_loss_scale

    def _zclip_factor(self, zclip: ZClip, norm: float) -> float:
        clip = self.engine.gradient_clipping() or inf
        left = norm / max(1.0, (norm + 1e-6) / clip)  # by DeepSpeed
        target = zclip.clip(norm)
        return min(1.0, target / left) if left else 1.0

    @property
    def _due(self) -> _Expected:
        if self._expected is None:
            raise RuntimeError("the engine took a step outside of train_step")
        return self._expected


def _read(loss: torch.Tensor, norm: Norm) -> tuple[float, float | None]:
    """Return loss and norm as numbers. The norm is infinite where it is not finite: DeepSpeed then also gives -1.

    Reading from a device waits for it, so both are read at once where both are there.
    """
    if norm is None:
        return float(loss), None
    if isinstance(norm, torch.Tensor) and norm.device == loss.device:
        values = torch.stack((loss, norm.view(()).to(loss.dtype))).tolist()
    else:
        values = [float(loss), float(norm)]
    loss_read, norm_read = values
    return loss_read, norm_read if isfinite(norm_read) and norm_read >= 0 else inf
