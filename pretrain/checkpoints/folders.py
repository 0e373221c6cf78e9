"""The folders of a run's checkpoints: their names, their age, their replacement and deletion."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pretrain.checkpoints.manifest import MANIFEST, saved_at
from pretrain.checkpoints.stored import find_universal
from pretrain.errors import UserError

_COMPLETE = re.compile(r"step_(\d{8,})", re.ASCII)


def folder_of(step: int) -> str:
    """Return the name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at `path`, from its name."""
    return int(path.name.removeprefix("step_"))


def resolve(path: Path) -> Path:
    """Return the checkpoint folder that `path` means: itself, or the one beside it that a `latest` file names.

    Raises:
        UserError: there is no complete checkpoint.
    """
    if path.name == "latest" and path.is_file():
        path = path.parent / _named_by(path)
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}. "
            "Name a folder such as runs/NAME/checkpoints/step_00000500, or runs/NAME/checkpoints/latest."
        )
    return path


def find_start(path: Path) -> Path:
    """Return the folder that a run can start from at `path`: a universal checkpoint of DeepSpeed's, or as `resolve` says."""
    return find_universal(path) or resolve(path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder` in the order in which they were saved: a run may have started again."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in entries if _COMPLETE.fullmatch(path.name)), key=_age)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename the whole folder `temporary` to `final`. An older `final` is deleted once the new one is in its place.

    It may be called again after it has failed, or has only seemed to fail.
    """
    doomed = _doomed(final)
    if temporary.exists() and final.exists():
        os.rename(final, doomed)
    if temporary.exists():
        os.rename(temporary, final)
    _delete(doomed)


def retire(path: Path) -> None:
    """Delete a checkpoint such that no half-deleted one carries a valid name."""
    doomed = _doomed(path)
    _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def delete_leftovers(folder: Path) -> None:
    """Delete what killed runs have left half written or half deleted. One that was being replaced gets its name back."""
    for temporary in folder.glob(".step_*.incomplete"):
        final = folder / temporary.name.removeprefix(".").removesuffix(".incomplete")
        if _doomed(final).exists() and not final.exists():
            os.rename(_doomed(final), final)
    for leftover in folder.glob(".step_*"):
        _delete(leftover)


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleting")


def _delete(path: Path) -> None:
    """Delete a folder, of a link only the link. What the file system does not release now is deleted at a later call."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _named_by(latest: Path) -> str:
    try:
        name = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{latest} cannot be read: {error}.") from error
    if not _COMPLETE.fullmatch(name):
        raise UserError(f"{latest} names {name!r}, which is no checkpoint beside it. Name the checkpoint itself.")
    return name


def _age(path: Path) -> tuple[float, int]:
    """Return when a checkpoint was saved, and its step."""
    return saved_at(path), step_of(path)
