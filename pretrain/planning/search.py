"""The layouts of a run that fit a cluster, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from pretrain.config.schema import Config
from pretrain.engine.deepspeed_config import deepspeed_config, read_deepspeed
from pretrain.engine.sequence_parallel import check_heads
from pretrain.engine.tensor_parallel import check_model
from pretrain.errors import UserError
from pretrain.planning.cluster import ROOM, Cluster
from pretrain.planning.memory import Memory, memory_of
from pretrain.planning.run_shape import RunShape
from pretrain.planning.step_time import StepTime, step_time

STAGES, RECOMPUTED = (1, 2, 3), ("off", "selective", "full")
_LONG = 16_384  # tokens: shorter sequences are not shared among ranks


@dataclass(frozen=True)
class Prediction:
    """A run in one layout on a cluster."""

    shape: RunShape
    memory: Memory
    time: StepTime

    def fits(self, cluster: Cluster) -> bool:
        """Return whether it fits the memory of a GPU of the cluster."""
        return self.memory.device_bytes <= ROOM * cluster.gpu.memory_bytes


def predict(shape: RunShape, cluster: Cluster) -> Prediction:
    """Return the memory and the time of a run on a cluster."""
    return Prediction(shape, memory_of(shape, cluster.gpu.memory_bytes), step_time(shape, cluster))


def fastest(given: RunShape, cluster: Cluster) -> list[Prediction]:
    """Return the layouts that fit, fastest first; of those that differ only in the micro-batch, the fastest one.

    ZeRO 1 to 3, tensor parallelism within a node, sequence parallelism for long sequences, every micro-batch that divides
    the global batch, and every kind of activation checkpointing. The optimizer is offloaded only where nothing fits without.
    """
    found = [each for each in _predictions(given, cluster, offload=False) if each.fits(cluster)]
    found = found or [each for each in _predictions(given, cluster, offload=True) if each.fits(cluster)]
    best: dict[tuple[object, ...], Prediction] = {}
    for each in sorted(found, key=_slowness):
        config = each.shape.config
        best.setdefault(
            (each.shape.zero_stage, config.parallel.tensor, config.parallel.sequence, config.activation_checkpointing),
            each,
        )
    return list(best.values())


def largest_micro_batch(given: RunShape, cluster: Cluster) -> int | None:
    """Return the largest micro-batch with which the layout of a run fits, None if none does."""
    config = given.config
    sizes = _divisors(config.data.largest_batch // given.data_ranks)
    fitting = [
        size for size in sizes if predict(with_changes(given, {"micro_batch_size": size}), cluster).fits(cluster)
    ]
    return max(fitting, default=None)


def with_changes(given: RunShape, changes: dict[str, Any]) -> RunShape:
    """Return a run in another layout. Raises UserError where that does not divide the ranks, the batch or the model.

    Args:
        given: the run.
        changes: any of stage, offload, tensor, sequence, micro_batch_size, activation_checkpointing.
    """
    config = given.config
    parallel = config.parallel.model_copy(
        update={key: changes[key] for key in ("tensor", "sequence") if key in changes}
    )
    data = config.data.model_copy(update={key: changes[key] for key in ("micro_batch_size",) if key in changes})
    update: dict[str, Any] = {"parallel": parallel, "data": data, "deepspeed": deepspeed_with(config, changes)}
    if "activation_checkpointing" in changes:
        update["activation_checkpointing"] = changes["activation_checkpointing"]
    config = config.model_copy(update=update)
    check_model(config, given.model_config)
    check_heads(config, given.model_config)
    ds_config = deepspeed_config(config, given.world_size)
    return RunShape(config, given.world_size, given.model_config, ds_config, given.weights)


def deepspeed_with(config: Config, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the run's DeepSpeed JSON for another stage, with the optimizer offloaded or not. Other keys stay."""
    content = dict(read_deepspeed(config)[1])
    zero = dict(content.get("zero_optimization", {}))
    if "stage" in changes and changes["stage"] != zero.get("stage", 0):
        zero = {key: value for key, value in zero.items() if not key.startswith(("stage3_", "zero_hpz"))}
        zero |= {"stage": changes["stage"]}
        if changes["stage"] >= 2:
            zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 100_000_000}
    if "offload" in changes:
        zero.pop("offload_optimizer", None)
        if changes["offload"]:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return content | {"zero_optimization": zero}


def _predictions(given: RunShape, cluster: Cluster, *, offload: bool) -> Iterator[Prediction]:
    data = given.config.data
    for tensor in _divisors(cluster.gpus_per_node):
        for sequence in _divisors(cluster.gpus_per_node // tensor) if data.seq_len >= _LONG else (1,):
            ranks, rest = divmod(given.world_size, tensor * sequence)
            if rest or data.largest_batch % ranks or not _is_allowed(given.config, tensor, sequence):
                continue
            for stage in STAGES:
                for recomputed in RECOMPUTED:
                    for size in _divisors(data.largest_batch // ranks):
                        changes = {
                            "stage": stage,
                            "offload": offload,
                            "tensor": tensor,
                            "sequence": sequence,
                            "micro_batch_size": size,
                            "activation_checkpointing": recomputed,
                        }
                        try:
                            yield predict(with_changes(given, changes), cluster)
                        except UserError:
                            break  # the layout does not divide the model, whatever the micro-batch


def _slowness(prediction: Prediction) -> tuple[float, int]:
    """Return the seconds of a step to three digits. Of equally fast layouts the larger micro-batch comes first."""
    return float(f"{prediction.time.seconds:.3g}"), -prediction.shape.config.data.micro_batch_size


def _is_allowed(config: Config, tensor: int, sequence: int) -> bool:
    """Return whether the run file's own checks, those of its methods above all, allow such a layout."""
    values = yaml.safe_load(config.to_yaml()) | {"parallel": {"tensor": tensor, "sequence": sequence}}
    try:
        Config.model_validate(values)
    except ValidationError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
