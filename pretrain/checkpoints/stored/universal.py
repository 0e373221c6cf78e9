"""The training state in a DeepSpeed universal checkpoint, found without reading, as in a checkpoint of our own.

    FOLDER/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     one weight, whole; flat if it comes from ZeRO-3
    FOLDER/zero/NAME/step.pt                                the optimizer's steps; not from ZeRO-3
    FOLDER/zero/optimizer_state.pt                          what the optimizer keeps besides
    FOLDER/*mp_rank_00_model_states.pt                      counters, names and shapes
    FOLDER/../latest_universal                              the name of FOLDER

The folders also hold what is no trained weight (buffers, other names of tied weights): `param_shapes` lists the weights.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.stored.counters import Counters, counters_in, first_file
from pretrain.checkpoints.stored.files import open_stored, read_span, span
from pretrain.checkpoints.stored.tensor import Part, StoredTensor
from pretrain.checkpoints.stored.weights import StoredWeight
from pretrain.errors import UserError
from pretrain.sharded.piece import Slice

LATEST = "latest_universal"
OPTIMIZER_STATE = Path("zero", "optimizer_state.pt")
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def is_universal(folder: Path) -> bool:
    """Return whether `folder` is a universal checkpoint."""
    return (folder / OPTIMIZER_STATE).is_file()


def find_universal(path: Path) -> Path | None:
    """Return the universal checkpoint that `path` means: itself, or the one in it that `latest_universal` names. None if none.

    Raises:
        UserError: the one that is named is not there.
    """
    if is_universal(path):
        return path
    latest = path / LATEST
    if not latest.is_file():
        return None
    try:
        name = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{latest} cannot be read: {error}.") from error
    if Path(name).name != name or not is_universal(path / name):
        raise UserError(
            f"{latest} names {name!r}, which is no universal checkpoint beside it. Name the checkpoint itself."
        )
    return path / name


def universal_counters(folder: Path) -> Counters:
    """Return DeepSpeed's counters in a universal checkpoint. Raises UserError if they cannot be read."""
    return counters_in(_model(folder), open_stored(folder / OPTIMIZER_STATE))


def universal_weights(folder: Path) -> dict[str, StoredWeight]:
    """Find every weight and its moments in a universal checkpoint, without reading any.

    Raises:
        UserError: files are missing or cannot be read, or the optimizer was another than Adam.
    """
    shapes = _shapes(folder)
    there = {path.name for path in (folder / "zero").iterdir() if path.is_dir()}
    if missing := sorted(shapes.keys() - there):
        raise UserError(f"{folder} lacks the weight {missing[0]}: it is not a whole universal checkpoint.")
    common_step = _common_step(folder)
    return {name: _weight(folder / "zero" / name, shape, common_step) for name, shape in shapes.items()}


def _weight(folder: Path, shape: tuple[int, ...], common_step: float | None) -> StoredWeight:
    keys = {path.stem for path in folder.glob("*.pt")} - {"fp32", "step"}
    if keys != _MOMENTS:
        raise UserError(
            f"{folder} holds {', '.join(sorted(keys)) or 'no moments'} where {', '.join(sorted(_MOMENTS))} were due: "
            "only runs with Adam or AdamW that have taken a step can continue here."
        )
    file = folder / "step.pt"
    step = _number(file, open_stored(file)) if file.exists() else common_step
    if step is None:
        raise UserError(f"{folder} does not say how many steps the optimizer has taken: there is no step.pt.")
    moments = {key: _tensor(folder / f"{key}.pt", shape) for key in sorted(keys)}
    return StoredWeight(_tensor(folder / "fp32.pt", shape), moments, {"step": step})


def _tensor(file: Path, shape: tuple[int, ...]) -> StoredTensor:
    content = open_stored(file)
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{file} holds no tensor: it is not of a universal checkpoint.")
    if tensor.dim() != 1 or tensor.numel() != prod(shape):  # with tensor parallelism `shape` is that of one rank's part
        shape = tuple(tensor.shape)
    return StoredTensor(shape, (Part(Slice(shape), 0, span(file, tensor)),))


def _common_step(folder: Path) -> float | None:
    """Return the steps of the optimizer where they are not kept weight by weight; None if they are."""
    file = folder / OPTIMIZER_STATE
    state = open_stored(file)
    of_optimizer = state.get("optimizer_state_dict") or {}
    holders = [*of_optimizer.get("state", {}).values(), *state.get("param_groups", ())]
    step = next((holder["step"] for holder in holders if "step" in holder), None)
    return None if step is None else _number(file, step)


def _number(file: Path, value: Any) -> float:
    return float(read_span(span(file, value))[0]) if isinstance(value, torch.Tensor) else float(value)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained weight, as the first tensor-parallel rank has it."""
    groups = _model(folder).get("param_shapes")
    if not groups:
        raise UserError(f"{folder} does not list its weights: its model states have no param_shapes.")
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _model(folder: Path) -> dict[str, Any]:
    model: dict[str, Any] = open_stored(first_file(folder, "*mp_rank_00_model_states.pt"))
    return model
