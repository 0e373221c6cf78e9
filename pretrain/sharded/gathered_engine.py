"""The simple second way to change weights: DeepSpeed's own functions, one full weight at a time on every rank.

It does the same as `ShardedWeights` through DeepSpeed's public API alone. The sharded arithmetic is tested and timed
against it. It gathers every weight in full for each statistic and again for each write, so its cost does not fall with
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from pretrain.errors import UserError
from pretrain.model.layout import Weight, describe_model
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.moments import Moments


class GatheredWeights:
    """The weights of a DeepSpeed engine through `GatheredParameters` and `safe_get_full_fp32_param`.

    Every method is collective: call it on all ranks, with the same arguments, between optimizer steps. Unlike
    `ShardedWeights`, nothing checks that.

    Attributes:
        parameters: the parameters of the engine's module by name.
        layout: each weight by name, in the order of the module.
    """

    def __init__(self, engine: Engine) -> None:
        """Bind to an engine.

        Args:
            engine: an initialized engine.

        Raises:
            UserError: where DeepSpeed's API reads or writes the wrong values, or none.
        """
        optimizer = engine.optimizer
        out_of_reach = {
            "tensor parallelism": engine.autotp_size() > 1,
            "an optimizer offloaded to NVMe": getattr(optimizer, "swap_optimizer", False),
            "zero_optimization.round_robin_gradients": getattr(optimizer, "round_robin_gradients", False),
            "half precision at ZeRO stage 0": hasattr(optimizer, "fp32_groups"),
        }
        for feature, used in out_of_reach.items():
            if used:
                raise UserError(f"the 'gathered' engine cannot reach the weights with {feature}: use 'sharded'.")
        self.parameters = dict(engine.module.named_parameters())
        self.layout: dict[str, Weight] = {weight.name: weight for weight in describe_model(engine.module)}

    def moments(self, names: Iterable[str] | None = None) -> dict[str, Moments]:
        """Return the moments of each named full weight, as `ShardedWeights.moments` does. Collective.

        Args:
            names: the weights to measure, every weight by default.
        """
        return {name: Moments.of(self._full_master(name)) for name in (self.parameters if names is None else names)}

    @torch.no_grad()
    def rescale_(self, changes: Mapping[str, tuple[float, float]]) -> None:
        """Replace each named weight W by scale * W + shift, as `ShardedWeights.rescale_` does. Collective.

        Writes the working copy through `GatheredParameters`, and then the master. Alone, the change of the working copy
        would be undone by the next optimizer step.

        Args:
            changes: (scale, shift) of each weight to change, by its name.
        """
        import deepspeed

        for name, (scale, shift) in changes.items():
            parameter = self.parameters[name]
            full = self._full_master(name).mul(scale).add_(shift)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(full)
            self._write_master(parameter, full, scale, shift)

    def _full_master(self, name: str) -> torch.Tensor:
        """Return the full fp32 weight, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(self.parameters[name])
        return self.parameters[name].data.float() if full is None else full

    def _write_master(self, parameter: torch.nn.Parameter, full: torch.Tensor, scale: float, shift: float) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param

        if hasattr(parameter, "ds_tensor"):
            # safe_set_full_fp32_param raises on the last rank when the world size does not divide the weight.
            local = safe_get_local_fp32_param(parameter)
            if local.data_ptr() != parameter.ds_tensor.data_ptr():
                local.mul_(scale).add_(shift)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            safe_set_full_fp32_param(parameter, full)
