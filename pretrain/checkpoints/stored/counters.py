"""DeepSpeed's own counters in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoints.stored.files import open_stored
from pretrain.errors import UserError

# The fields of a dynamic loss scaler that change in training. The others are options of the run.
_OF_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Counters:
    """DeepSpeed's own counters.

    Attributes:
        global_steps: optimizer steps, skipped ones included.
        global_samples: sequences that all ranks have read.
        skipped_steps: steps that fp16 left out at an overflow.
        loss_scale: the fields of fp16's dynamic loss scaler that change in training; empty in other precisions.
    """

    global_steps: int
    global_samples: int
    skipped_steps: int
    loss_scale: dict[str, float]


def stored_counters(folder: Path) -> Counters:
    """Return the counters in a checkpoint's folder of DeepSpeed's files. Raises UserError if they cannot be read."""
    model = open_stored(first_file(folder, "*mp_rank_00_model_states.pt"))
    if model["optimizer"] is not None:  # stage 0
        return _counters(model, model["optimizer"], model["optimizer"].get("dynamic_loss_scale", False))
    state = open_stored(first_file(folder, "*mp_rank_00_optim_states.pt"))["optimizer_state_dict"]
    return counters_in(model, state)


def counters_in(model: dict[str, Any], state: dict[str, Any]) -> Counters:
    """Return the counters in DeepSpeed's model states and in the state of its ZeRO optimizer."""
    scaler = vars(state["loss_scaler"]) if "loss_scaler" in state else {}
    return _counters(model, scaler, scaler.get("dynamic", False))


def _counters(model: dict[str, Any], scaler: dict[str, Any], dynamic: bool) -> Counters:
    return Counters(
        model["global_steps"], model["global_samples"], model["skipped_steps"], _changing(scaler) if dynamic else {}
    )


def _changing(scaler: dict[str, Any]) -> dict[str, float]:
    return {key: scaler[key] for key in _OF_SCALER if scaler.get(key) is not None}


def first_file(folder: Path, pattern: str) -> Path:
    """Return the first file of this pattern, UserError without one. All ranks' files hold the same counters."""
    path = next(iter(sorted(folder.glob(pattern))), None)
    if path is None:
        raise UserError(f"{folder} holds no whole DeepSpeed checkpoint: there is no file {pattern}.")
    return path
