"""Turns a training checkpoint into a DeepSpeed universal checkpoint, which any DeepSpeed engine loads at ZeRO 1, 2 or 3.

The weights and moments go from the files of the ranks to one file each, one after another. `checkpoints/stored/universal.py`
says what a universal checkpoint consists of. Unlike DeepSpeed's own converter, this one gives every tensor its shape, so
that a checkpoint of any stage can be loaded at any other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.folders import resolve
from pretrain.checkpoints.manifest import verify
from pretrain.checkpoints.safe_load import read_safely
from pretrain.checkpoints.shard_metadata import load_shard_metadata
from pretrain.checkpoints.stored import StoredWeight, stored_weights
from pretrain.checkpoints.stored.counters import first_file
from pretrain.checkpoints.stored.universal import LATEST, OPTIMIZER_STATE
from pretrain.checkpoints.writer import save_synced
from pretrain.errors import UserError
from pretrain.files import free_bytes, sync_folder, unfinished, write_text
from pretrain.sharded.stepped_tensors import AVERAGE

# DeepSpeed's loaders look for either name, by the stage of the engine that loads.
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_OF_MODEL = (
    *("global_steps", "global_samples", "skipped_steps", "dp_world_size", "lr_scheduler"),
    *("ds_config", "ds_version", "buffer_names", "sparse_tensor_module_names"),
)
_OF_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "zero_stage")
_MOMENTS = {"exp_avg", "exp_avg_sq"}
_BETWEEN_LINES_S = 10.0


def export_universal(checkpoint: Path, out: Path, say: Callable[[str], None]) -> Path:
    """Write a universal checkpoint into the new folder `out`, and return the checkpoint's folder in it.

    `out` appears when it is whole.

    Args:
        checkpoint: the checkpoint's folder, or `latest`.
        out: the folder to make. `engine.load_checkpoint(out)` loads it.
        say: logs one line.

    Raises:
        UserError: the checkpoint is damaged or not of AdamW, `out` exists, or there is no room.
    """
    if out.exists():
        raise UserError(f"{out} exists already and is left as it is. Give --out another folder, or remove it first.")
    checkpoint = resolve(checkpoint)
    verify(checkpoint)
    source = checkpoint / "deepspeed"
    weights = _with_moments_of_adam(checkpoint, stored_weights(source), say)
    model, optimizer = _common(source)
    total = 4 * sum(prod(weight.master.shape) * (1 + len(weight.moments)) for weight in weights.values())
    tag = f"global_step{model['global_steps']}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(out.parent)
        if free is not None and free < total:
            raise UserError(f"{out} needs {total / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free.")
        with unfinished(out.with_name(f".{out.name}.{os.getpid()}.tmp")) as temporary:
            folder = temporary / tag
            _write_weights(folder / "zero", weights, load_shard_metadata(checkpoint).cut_along, total, say)
            step = torch.tensor(next(iter(weights.values())).scalars["step"])
            save_synced(folder / OPTIMIZER_STATE, _with_step(optimizer, step))
            shapes = {name: torch.Size(weight.master.shape) for name, weight in weights.items()}
            for name in _MODEL_FILES:
                save_synced(
                    folder / name,
                    {**model, "module": {}, "optimizer": None, "mp_world_size": 1, "param_shapes": [shapes]},
                )
            write_text(temporary / LATEST, tag)
            for made in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
                sync_folder(made)
            os.replace(temporary, out)
            sync_folder(out.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error}. Free disk space, or correct the permissions of the file it names."
        ) from error
    return out / tag


def _with_moments_of_adam(
    checkpoint: Path, weights: dict[str, StoredWeight], say: Callable[[str], None]
) -> dict[str, StoredWeight]:
    """Return the weights with what a universal checkpoint has a place for. UserError unless Adam's moments are there."""
    if any(AVERAGE in weight.moments for weight in weights.values()):
        say("the average of the weights is left out: a universal checkpoint has no place for it")
    found = {}
    for name, weight in weights.items():
        moments = {key: tensor for key, tensor in weight.moments.items() if key != AVERAGE}
        if moments.keys() != _MOMENTS:
            raise UserError(
                f"{checkpoint} holds {', '.join(sorted(moments)) or 'no moments'} of {name}. A universal checkpoint has a "
                "place for the two moments of Adam only: a run with another optimizer, or one that has taken no step, cannot "
                "be converted. tools/convert_to_hf.py converts its weights."
            )
        found[name] = replace(weight, moments=moments)
    return found


def _common(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a checkpoint holds besides tensors: of its model states, and of its optimizer with parameter groups."""
    model = read_safely(first_file(source, "*mp_rank_00_model_states.pt"), device="meta")
    optimizer = {"ds_version": model["ds_version"]}  # loaders at ZeRO 1 and 2 ask for it
    if model["optimizer"] is not None:  # stage 0
        inner = model["optimizer"].get("optimizer_state_dict", model["optimizer"])
    else:
        state = read_safely(first_file(source, "*mp_rank_00_optim_states.pt"), device="meta")["optimizer_state_dict"]
        inner = state["optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"]
        optimizer |= {key: state[key] for key in _OF_OPTIMIZER if key in state}
    optimizer["param_groups"] = inner["param_groups"]
    return {key: model[key] for key in _OF_MODEL if key in model}, optimizer


def _with_step(optimizer: dict[str, Any], step: torch.Tensor) -> dict[str, Any]:
    """Return the optimizer's state as all loaders look for it. ZeRO-3's wants step and groups one level down."""
    return {
        **optimizer,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": optimizer["param_groups"]},
    }


def _write_weights(
    folder: Path, weights: dict[str, StoredWeight], cut_along: dict[str, int], total: int, say: Callable[[str], None]
) -> None:
    done, line = 0, time.monotonic()
    for name, weight in weights.items():
        for key, tensor in {"fp32": weight.master, **weight.moments}.items():
            save_synced(folder / name / f"{key}.pt", {"cat_dim": cut_along.get(name, 0), "param": tensor()})
            done += 4 * prod(tensor.shape)
            if time.monotonic() - line > _BETWEEN_LINES_S:
                line = time.monotonic()
                say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB are written")
        save_synced(folder / name / "step.pt", torch.tensor(weight.scalars["step"]))
