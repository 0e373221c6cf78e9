"""The folders of a run's checkpoints: their names, their age, and how one goes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pretrain.checkpoints.manifest import MANIFEST, saved_at
from pretrain.errors import UserError

_COMPLETE = re.compile(r"step_(\d{8,})", re.ASCII)


def folder_of(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the one beside it that a `latest` file names.

    Raises UserError if there is none.
    """
    if path.name == "latest" and path.is_file():
        path = path.parent / _named_by(path)
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}. "
            "Name a folder such as runs/NAME/checkpoints/step_00000500, or runs/NAME/checkpoints/latest."
        )
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: by when they were saved, as a run may have begun anew."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _COMPLETE.fullmatch(path.name)), key=_age)


def put_in_place(aside: Path, final: Path) -> None:
    """Give a whole folder its name. One that has it already goes, and not before the new one is in its place.

    May be called again where it has failed, or only seemed to.
    """
    doomed = _doomed(final)
    if aside.exists() and final.exists():
        os.rename(final, doomed)
    if aside.exists():
        os.rename(aside, final)
    _delete(doomed)


def retire(path: Path) -> None:
    """Delete a checkpoint such that no half-deleted one carries a valid name."""
    doomed = _doomed(path)
    _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def delete_leftovers(folder: Path) -> None:
    """What killed runs have left half written or half deleted; but one that was being replaced gets its name back."""
    for aside in folder.glob(".step_*.incomplete"):
        final = folder / aside.name.removeprefix(".").removesuffix(".incomplete")
        if _doomed(final).exists() and not final.exists():
            os.rename(_doomed(final), final)
    for leftover in folder.glob(".step_*"):
        _delete(leftover)


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleting")


def _delete(path: Path) -> None:
    """Of a link only the link. What a file system does not let go of now is a leftover, which goes another time."""
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
    """When a checkpoint was saved, and its step."""
    return saved_at(path), step_of(path)
