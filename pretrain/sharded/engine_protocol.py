"""The part of a DeepSpeed engine that Evenkeel uses, for type checkers: DeepSpeed itself has no types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine(Protocol):
    """A `DeepSpeedEngine` around a causal language model.

    Attributes:
        module: the model. Under ZeRO-3 its parameters are empty between passes.
        optimizer: what `step` calls. A wrapper of DeepSpeed's around `basic_optimizer`, of a class that depends on the
            ZeRO stage and the precision, or `basic_optimizer` itself (stage 0 in fp32). The classes share `param_groups`
            and, in half precision, `loss_scale`. Only `sharded/`, `engine/` and `checkpoints/` read more than that.
        basic_optimizer: the optimizer that `deepspeed.initialize` was given.
        device: where the model computes.
        mpu: DeepSpeed's model-parallel groups, None without tensor parallelism.
        data_parallel_group: the ranks that read different batches and share out the weights.
        dp_world_size: the number of ranks in it.
        micro_steps: micro-batches that were stepped, since the engine was built or their number in a step changed.
        global_steps: optimizer steps, skipped ones included.
        global_samples: sequences that all ranks have read.
        skipped_steps: optimizer steps that DeepSpeed left out at an overflow of fp16.
        checkpoint_engine: writes and reads DeepSpeed's files.
        clip_fp32_gradients: clips the gradients in fp32 without ZeRO.
    """

    module: PreTrainedModel
    optimizer: Any
    basic_optimizer: torch.optim.Optimizer
    device: torch.device
    mpu: Any
    data_parallel_group: dist.ProcessGroup
    dp_world_size: int
    micro_steps: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    checkpoint_engine: Any
    clip_fp32_gradients: Callable[[], None]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the losses of a micro-batch by name, as the model's head computes them."""

    def train(self, mode: bool = True) -> None:
        """Put the model in training mode."""

    def eval(self) -> None:
        """Put the model in evaluation mode."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, divided by the number of micro-batches in a step."""

    def step(self) -> None:
        """End a micro-batch. After the last one of a step: reduce, clip, and call the optimizer."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""

    def zero_optimization(self) -> bool:
        """Return whether ZeRO is on: at stages 1 to 3."""

    def fp16_enabled(self) -> bool:
        """Return whether the working copies are fp16."""

    def bfloat16_enabled(self) -> bool:
        """Return whether the working copies are bf16."""

    def dynamic_loss_scale(self) -> bool:
        """Return whether fp16's loss scale falls at an overflow and grows again."""

    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-batches in an optimizer step."""

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the samples of a micro-batch."""

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Set the samples of an optimizer step, by the number of micro-batches in it."""

    def gradient_clipping(self) -> float:
        """Return the norm that gradients are clipped to, 0 for none."""

    def autotp_size(self) -> int:
        """Return the number of ranks in a tensor-parallel group, 0 or 1 without tensor parallelism."""

    def save_checkpoint(self, save_dir: str, tag: str, *, save_latest: bool) -> object:
        """Write the files of this rank through `checkpoint_engine`. Collective."""

    def load_checkpoint(self, load_dir: str, tag: str) -> object:
        """Read the files of this rank through `checkpoint_engine`. Collective."""

    # Private to DeepSpeed.
    _config: Any
    _copy_recovery_script: Callable[[str], None]

    def _get_zero_param_shapes(self) -> list[dict[str, torch.Size]]: ...

    def _get_ckpt_name(self, checkpoints_path: Path, tag: str) -> str: ...

    def _get_all_ckpt_names(self, checkpoints_path: Path, tag: str) -> list[str]: ...

    def _get_zero_ckpt_name(self, checkpoints_path: Path, tag: str) -> str: ...
