"""Metadata of the weights that DeepSpeed's files lack, kept beside them as `shards.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import write_json
from pretrain.sharded.engine_protocol import Engine
from pretrain.sharded.piece import tensor_slice

_FILE = "shards.json"


@dataclass(frozen=True)
class ShardMetadata:
    """The content of `shards.json`. The defaults hold for a checkpoint without the file.

    Attributes:
        tensor_ranks: the number of tensor-parallel ranks that the weights were cut among.
        cut_along: the dimension that each cut weight was cut along, by name. Weights that are whole on each are not listed.
        whole_masters: only at stage 0: names of the weights that follow one another in each parameter group, in the
            optimizer's state and, in half precision, among the fp32 masters. Older versions left them out in fp32.
    """

    tensor_ranks: int = 1
    cut_along: dict[str, int] = field(default_factory=dict)
    whole_masters: list[list[str]] = field(default_factory=list)


def metadata_of(engine: Engine) -> ShardMetadata:
    """Return the metadata of the files that `engine` saves. The same on every rank."""
    parameters = dict(engine.module.named_parameters())
    cuts = {name: tensor_slice(parameter, name).dim for name, parameter in parameters.items()}
    return ShardMetadata(
        tensor_ranks=max(1, engine.autotp_size()),
        cut_along={name: dim for name, dim in cuts.items() if dim is not None},
        whole_masters=weights_by_group(engine) if engine.zero_optimization_stage() == 0 else [],
    )


def weights_by_group(engine: Engine) -> list[list[str]]:
    """Return the names of the weights in each parameter group (at ZeRO-3: sub-group) of an engine, in their order."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for attribute in ("fp16_groups", "bit16_groups", "bf16_groups"):  # of DeepSpeed's classes
        if hasattr(engine.optimizer, attribute):
            groups = getattr(engine.optimizer, attribute)
            break
    else:
        groups = [group["params"] for group in engine.optimizer.param_groups]
    return [[names[id(parameter)] for parameter in group] for group in groups]


def save_shard_metadata(folder: Path, metadata: ShardMetadata) -> None:
    """Write the metadata into a checkpoint folder."""
    write_json(folder / _FILE, asdict(metadata))


def load_shard_metadata(folder: Path) -> ShardMetadata:
    """Return the metadata of a checkpoint folder. Raises UserError if the file cannot be read."""
    path = folder / _FILE
    if not path.exists():
        return ShardMetadata()
    try:
        return ShardMetadata(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
