"""The global norm of the gradients that DeepSpeed has reduced, before it clips them.

Each of DeepSpeed's optimizers keeps the norm in its own way, or takes it and forgets it. Muon's momentum moves before the
optimizer's step is called, so with Muon the norm is found, and the step decided, before that.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch

from pretrain.sharded.engine_protocol import Engine

Norm = torch.Tensor | float | None


class GradientNorm:
    """The gradient norm of one engine, once per step."""

    def __init__(self, engine: Engine, may_move: Callable[[Norm], bool]) -> None:
        """Hook into the engine's optimizer.

        Args:
            engine: the engine. Every rank must do this.
            may_move: called with the norm when Muon's momentum is about to move. Returns whether it may.
        """
        self.engine, self._may_move = engine, may_move
        self._norm: Norm = None
        if engine.optimizer is engine.basic_optimizer:
            engine.clip_fp32_gradients = lambda: self._clip(engine.gradient_clipping())
        if self._uses_muon():
            self._gate_momentum()

    def forget(self) -> None:
        """Drop the norm of the last step: another one begins."""
        self._norm = None

    def measured(self, loss_scale: float) -> Norm:
        """Return the norm, in the optimizer's step: a scalar tensor or a number, None where DeepSpeed takes none."""
        engine = self.engine
        if engine.optimizer is engine.basic_optimizer and self._norm is None:
            self._clip(inf)
        if self._norm is not None or self._uses_muon():
            return self._norm
        # The fp16 optimizer without ZeRO is the only one that leaves the scale in the norm.
        return engine.optimizer._global_grad_norm / (1.0 if engine.zero_optimization_stage() else loss_scale)

    def _clip(self, max_norm: float) -> None:
        """Clip as DeepSpeed does in fp32 without ZeRO, and keep the norm, which DeepSpeed forgets."""
        from deepspeed.runtime.utils import clip_grad_norm_

        self._norm = clip_grad_norm_(self.engine.module.parameters(), max_norm, mpu=self.engine.mpu)

    def _uses_muon(self) -> bool:
        return any(group.get("use_muon") for group in self.engine.basic_optimizer.param_groups)

    def _gate_momentum(self) -> None:
        """Find the norm before DeepSpeed turns gradients into Muon's updates, and ask whether it may."""
        optimizer = self.engine.optimizer
        for name, norm in _MOMENTUM.get(type(optimizer).__name__, {}).items():
            setattr(optimizer, name, self._if_it_may(getattr(optimizer, name), norm))

    def _if_it_may(self, move_momentum: Callable[[], None], norm: Callable[[Any], Norm]) -> Callable[[], None]:
        def gated() -> None:
            self._norm = norm(self.engine.optimizer)
            if self._may_move(self._norm):
                move_momentum()

        return gated


def _norm_in_zero3(optimizer: Any) -> torch.Tensor:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


# By DeepSpeed's optimizer: the method that moves Muon's momentum, and the norm of the gradients at that moment. Where
# ZeRO-1 and 2 are not offloaded, the norm is never taken: they compute updates while they reduce, and here only keep the
# momentum.
_MOMENTUM: dict[str, dict[str, Callable[[Any], Norm]]] = {
    "DeepSpeedZeroOptimizer_Stage3": {"_apply_muon_to_accumulated_grads": _norm_in_zero3},
    "DeepSpeedZeroOptimizer": {
        "_apply_muon_updates_cpu_offload": lambda optimizer: optimizer.scaled_global_norm(),
        "_commit_muon_momentum": lambda optimizer: None,
    },
    "BF16_Optimizer": {"_prepare_muon_updates": lambda optimizer: optimizer._global_grad_norm},
}
