"""What DeepSpeed's files leave unsaid about the weights in them, kept beside them as `shards.json`.

tensor_ranks    how many tensor-parallel ranks the weights were cut among
cut_along       weight -> the dimension it was cut along; weights that are whole on each of them are not listed
whole_masters   stage 0 in half precision: the weights whose fp32 masters follow one another in each parameter group
"""

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
class ShardNotes:
    """See the module. The defaults say what a checkpoint without the file means."""

    tensor_ranks: int = 1
    cut_along: dict[str, int] = field(default_factory=dict)
    whole_masters: list[list[str]] = field(default_factory=list)


def notes_on(engine: Engine) -> ShardNotes:
    """The notes on the files that `engine` saves. The same on every rank."""
    parameters = dict(engine.module.named_parameters())
    cuts = {name: tensor_slice(parameter, name).dim for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    half_stage0 = engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "fp32_groups")
    return ShardNotes(
        tensor_ranks=max(1, engine.autotp_size()),
        cut_along={name: dim for name, dim in cuts.items() if dim is not None},
        whole_masters=[[names[id(p)] for p in group] for group in engine.optimizer.fp16_groups] if half_stage0 else [],
    )


def save_notes(folder: Path, notes: ShardNotes) -> None:
    """Write the notes into a checkpoint folder."""
    write_json(folder / _FILE, asdict(notes))


def load_notes(folder: Path) -> ShardNotes:
    """The notes of a checkpoint folder. Raises UserError if they cannot be read."""
    path = folder / _FILE
    if not path.exists():
        return ShardNotes()
    try:
        return ShardNotes(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
