"""Reads files without running anything in them: they hold tensors and plain values, or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import safe_globals

from pretrain.errors import UserError
from pretrain.files import patiently

# DeepSpeed stores these besides tensors and plain values: an enumeration and three records of numbers.
_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def read_safely(path: Path, device: str = "cpu", stand_in: type | None = None) -> Any:
    """Return the object that `torch.save` wrote into `path`.

    Args:
        path: the file.
        device: where its tensors go.
        stand_in: a class whose objects take the place of those of DeepSpeed's classes, which are then not imported.

    Raises:
        UserError: the file cannot be read, or holds anything that would have to be run to be read.
    """
    classes: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (stand_in or resolve_name(":".join(name.rsplit(".", 1))), name) for name in _CLASSES
    ]

    def read() -> Any:
        with safe_globals(classes):
            return torch.load(path, map_location=device, weights_only=True)

    try:
        return patiently(read, f"reading {path}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # a file that was made to fail can fail in any way
        raise UserError(
            f"{path} holds something else than tensors and plain values ({_reason(error)}): it is damaged, of an older version "
            "of the trainer, or not to be trusted. Nothing in it was run."
        ) from error


def read_tensors(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name. Raises UserError if it cannot be read or lacks one of `names`."""
    try:
        tensors = patiently(lambda: load_file(path), f"reading {path}")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if missing := set(names) - tensors.keys():
        raise UserError(f"{path} holds no {', '.join(sorted(missing))}: it is not what the trainer wrote.")
    return tensors


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's message. The rest advises to read the file unsafely."""
    cause = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
    return f"{type(cause).__name__}: {cause}".split(". ")[0].splitlines()[0]
