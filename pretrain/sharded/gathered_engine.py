"""The simple second engine: DeepSpeed's own hooks, one full weight at a time on every rank.

It answers the same questions as `ShardedWeights` through DeepSpeed's public API alone, so it serves as the yardstick
that the sharded arithmetic is tested and timed against. It gathers every weight in full for each statistic and again
for each write, so its cost does not fall with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from pretrain.errors import UserError
from pretrain.model.layout import Weight, describe_model
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.moments import Moments


class GatheredWeights:
    """The weights of a DeepSpeed engine through `GatheredParameters` and `safe_get_full_fp32_param`."""

    def __init__(self, engine: Engine) -> None:
        """Raises UserError where DeepSpeed's API reads or writes the wrong values, or none."""
        optimizer = engine.optimizer
        out_of_reach = {
            "tensor parallelism": engine.autotp_size() > 1,
            "an optimizer offloaded to NVMe": getattr(optimizer, "swap_optimizer", False),
            "zero_optimization.round_robin_gradients": getattr(optimizer, "round_robin_gradients", False),
            "half precision at ZeRO stage 0": hasattr(optimizer, "fp32_groups"),
        }
        for what, found in out_of_reach.items():
            if found:
                raise UserError(f"the 'gathered' engine cannot reach the weights with {what}: use 'sharded'.")
        self.parameters = dict(engine.module.named_parameters())
        self.layout: dict[str, Weight] = {weight.name: weight for weight in describe_model(engine.module)}

    def moments(self, names: Iterable[str] | None = None) -> dict[str, Moments]:
        """As `ShardedWeights.moments`, from each full fp32 weight."""
        return {name: Moments.of(self._full_master(name)) for name in (self.parameters if names is None else names)}

    @torch.no_grad()
    def rescale_(self, changes: Mapping[str, tuple[float, float]]) -> None:
        """As `ShardedWeights.rescale_`: the working copy through `GatheredParameters`, then the master.

        Writing the working copy alone would be undone by the next optimizer step.
        """
        import deepspeed

        for name, (scale, shift) in changes.items():
            parameter = self.parameters[name]
            full = self._full_master(name).mul(scale).add_(shift)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(full)
            self._write_master(parameter, full, scale, shift)

    def _full_master(self, name: str) -> torch.Tensor:
        """The full fp32 weight, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(self.parameters[name])
        return self.parameters[name].data.float() if full is None else full

    def _write_master(self, parameter: torch.nn.Parameter, full: torch.Tensor, scale: float, shift: float) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param

        if hasattr(parameter, "ds_id"):
            # safe_set_full_fp32_param raises on the last rank when the world size does not divide the weight.
            local = safe_get_local_fp32_param(parameter)
            if local.data_ptr() != parameter.ds_tensor.data_ptr():
                local.mul_(scale).add_(shift)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            safe_set_full_fp32_param(parameter, full)
