"""Between DeepSpeed's gradients and the optimizer: what becomes of a step is decided here, alike on every rank.

DeepSpeed reduces the gradients, takes their global norm, clips, and calls the step of the optimizer that it was given:
once for each sub-group of weights (ZeRO-3), each parameter group (ZeRO-1 and 2), or all weights. The gate stands in for
that call. At the first one of a step it decides from the mean loss and the norm, which all ranks have alike:

    taken      the optimizer steps on DeepSpeed's gradient
    clipped    on the gradient times a factor below 1
    left out   the optimizer is not called: masters, moments and step counters stay what they were, bit for bit

and DeepSpeed then drops the gradients and copies masters to working copies, as after every step.

Where the norm is not finite DeepSpeed leaves the step out by itself, except in fp32 without ZeRO, and in bf16 at ZeRO-2
as `check_grad_overflow` is off. Muon's momentum moves before the optimizer is called: it is gated too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch

from pretrain.optim.zclip import ZClip
from pretrain.resilience.spike_guard import SpikeGuard, StepVerdict
from pretrain.sharded.engine_protocol import Engine


@dataclass(frozen=True)
class Decision:
    """What becomes of one step.

    norm: of the global gradient, before any clipping; None where DeepSpeed knows none (Muon's at ZeRO-1 and 2), infinite
    where it is not finite. factor: what the gate multiplies the gradient by after DeepSpeed's own clipping, 0 if left out.
    """

    verdict: StepVerdict
    norm: float | None
    factor: float


class StepGate:
    """The gate of one engine. Every rank must make one, and take every step from then on through `train_step`.

    watchers: called when a step is about to be taken, while its gradients are whole: neither clipped nor rejected.
    """

    def __init__(self, engine: Engine, guard: SpikeGuard, zclip: ZClip | None = None) -> None:
        self.engine, self.guard, self.zclip = engine, guard, zclip
        self.watchers: list[Callable[[], None]] = []
        self._expected: tuple[int, torch.Tensor, float] | None = None
        self._decision: Decision | None = None
        self._norm: torch.Tensor | None = None
        optimizer = engine.basic_optimizer
        self._optimizer_step, optimizer.step = optimizer.step, self._step
        if engine.optimizer is optimizer:
            engine.clip_fp32_gradients = lambda: self._clip(engine.gradient_clipping())
        if self._uses_muon():
            self._gate_momentum()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike, bit for bit: JSON numbers."""
        return {"guard": self.guard.state(), "zclip": self.zclip.state() if self.zclip else {}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the `state` of an earlier gate; one that is empty, or lacks a part, is that of a new run."""
        self.guard.load_state(state.get("guard", {}))
        if self.zclip:
            self.zclip.load_state(state.get("zclip", {}))

    def rolled_back(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint that holds `state`."""
        self.guard.rolled_back(state.get("guard", {}))
        if self.zclip:
            self.zclip.load_state(state.get("zclip", {}))

    def expect(self, step: int, loss: torch.Tensor, loss_scale: float) -> None:
        """The engine is about to take optimizer step `step`, of mean loss `loss`, with gradients at `loss_scale`."""
        self._expected, self._decision, self._norm = (step, loss, loss_scale), None, None
        if scaler := getattr(self.engine.optimizer, "loss_scaler", None):
            scaler.raise_error_at_min_scale = False  # a step that overflows there is the guard's
        for watch in self.watchers:
            watch()

    def passed(self) -> Decision:
        """What became of the step that was expected, after the engine has taken it."""
        decision = self._decide(inf)  # unless the optimizer was called: then DeepSpeed has left the step out by itself
        self._expected = None
        return decision

    def _step(self) -> None:
        """Stands in for the optimizer's step, which DeepSpeed calls with the gradients of some weights in place."""
        factor = self._decide(self._global_norm()).factor
        if factor == 0.0:
            return
        if factor < 1.0:
            for group in self.engine.basic_optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        self._optimizer_step()

    def _decide(self, norm: torch.Tensor | float | None) -> Decision:
        """The decision on the expected step; the first one stands."""
        if self._decision is None:
            step, loss, loss_scale = self._expected
            norm = None if norm is None else _as_number(norm)
            verdict = self._judge(step, float(loss), norm, loss_scale)
            factor = 0.0 if verdict.skip else 1.0 if self.zclip is None else self._zclip_factor(norm)
            self._decision = Decision(verdict, norm, factor)
        return self._decision

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

    def _zclip_factor(self, norm: float) -> float:
        clip = self.engine.gradient_clipping() or inf
        left = norm / max(1.0, (norm + 1e-6) / clip)  # by DeepSpeed
        target = self.zclip.clip(norm)
        return min(1.0, target / left) if left else 1.0

    def _global_norm(self) -> torch.Tensor | float | None:
        """The norm of the gradients that DeepSpeed has just reduced, before clipping."""
        engine = self.engine
        if engine.optimizer is engine.basic_optimizer and self._norm is None:
            self._clip(inf)
        if self._norm is not None or self._uses_muon():
            return self._norm
        _, _, loss_scale = self._expected
        # The fp16 optimizer without ZeRO is the only one that leaves the scale in the norm.
        return engine.optimizer._global_grad_norm / (1.0 if engine.zero_optimization_stage() else loss_scale)

    def _clip(self, max_norm: float) -> None:
        """DeepSpeed's clipping in fp32 without ZeRO, which forgets the norm."""
        from deepspeed.runtime.utils import clip_grad_norm_

        self._norm = clip_grad_norm_(self.engine.module.parameters(), max_norm, mpu=self.engine.mpu)

    def _uses_muon(self) -> bool:
        return any(group.get("use_muon") for group in self.engine.basic_optimizer.param_groups)

    def _gate_momentum(self) -> None:
        """Decide before DeepSpeed turns gradients into Muon's updates, and leave that out with the step."""
        optimizer = self.engine.optimizer
        for name, norm in _MOMENTUM.get(type(optimizer).__name__, {}).items():
            setattr(optimizer, name, self._unless_left_out(getattr(optimizer, name), norm))

    def _unless_left_out(self, move_momentum: Callable[[], None], norm: Callable) -> Callable[[], None]:
        def gated() -> None:
            self._norm = norm(self.engine.optimizer)
            if self._decide(self._norm).factor:
                move_momentum()

        return gated


def _norm_in_zero3(optimizer) -> torch.Tensor:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


# By DeepSpeed's optimizer: what moves Muon's momentum, and the norm of the gradients at that moment. Where ZeRO-1 and 2
# are not offloaded, the norm is never taken: they compute updates while they reduce, and here only keep the momentum.
_MOMENTUM: dict[str, dict[str, Callable]] = {
    "DeepSpeedZeroOptimizer_Stage3": {"_apply_muon_to_accumulated_grads": _norm_in_zero3},
    "DeepSpeedZeroOptimizer": {
        "_apply_muon_updates_cpu_offload": lambda optimizer: optimizer.scaled_global_norm(),
        "_commit_muon_momentum": lambda optimizer: None,
    },
    "BF16_Optimizer": {"_prepare_muon_updates": lambda optimizer: optimizer._global_grad_norm},
}


def _as_number(norm: torch.Tensor | float) -> float:
    """A number; infinite where the norm is not finite, for which DeepSpeed also says -1."""
    norm = float(norm)
    return norm if isfinite(norm) and norm >= 0 else inf
