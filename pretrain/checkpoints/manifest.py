"""`manifest.json` holds the size and checksum of every file of a checkpoint, to verify them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.errors import UserError
from pretrain.files import checksum, patiently, write_json
from pretrain.monitor.phase import current, enter

MANIFEST = "manifest.json"


def describe(folder: Path, name: str) -> dict[str, Any]:
    """Return the manifest's entry for the file `name`, which is flushed to disk. Raises OSError."""
    path = folder / name
    return {"bytes": path.stat().st_size, "xxh3_128": checksum(path, sync=True)}


def save_manifest(folder: Path, entries: dict[str, dict[str, Any]], after: float) -> None:
    """Write the manifest.

    Args:
        folder: the checkpoint.
        entries: `describe` of each file, by name.
        after: the newest `saved_at` of the older checkpoints, in seconds since the epoch. The clock may be behind it.
    """
    now = max(time.time(), after + 1e-3)
    write_json(folder / MANIFEST, {"schema_version": 1, "saved_at": now, "files": dict(sorted(entries.items()))})


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest: every `world_size`-th file from number `rank` on.

    Raises:
        UserError: a file is missing, has another size or content, lies elsewhere, or is not listed.
    """
    files = _read_manifest(folder)
    if rank == 0:
        _refuse_unlisted(folder, files)
    for name in sorted(files)[rank::world_size]:
        enter(current().name)  # the watchdog sees progress
        _check(_inside(folder, name), *files[name])


def saved_at(folder: Path) -> float:
    """Return when the checkpoint was saved, in seconds since the epoch; of a damaged one, when its folder last changed."""
    try:
        return float(_read(folder)["saved_at"])
    except (UserError, KeyError, TypeError, ValueError):
        return folder.lstat().st_mtime


def _check(file: Path, expected_bytes: int, expected_sum: str) -> None:
    def look() -> tuple[int | None, str | None]:
        """Return size and checksum, the checksum only of a file of the right size."""
        size = file.stat().st_size if file.is_file() else None
        return size, checksum(file) if size == expected_bytes else None

    try:
        size, actual_sum = patiently(look, f"reading {file}")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if size != expected_bytes:
        fault = "is missing" if size is None else f"has {size} bytes instead of {expected_bytes}"
        raise UserError(f"{file} {fault}.")
    if actual_sum != expected_sum:
        raise UserError(f"{file} does not match its checksum: its content has changed since it was saved.")


def _read(folder: Path) -> Any:
    path = _inside(folder, MANIFEST)
    try:
        return json.loads(patiently(path.read_bytes, f"reading {path}"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return bytes and checksum of every file of the checkpoint, by name."""
    manifest = _read(folder)
    try:
        return {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {type(error).__name__} {error}.") from error


def _inside(folder: Path, name: str) -> Path:
    """Return the file `name` of a checkpoint. Raises UserError if it would lie anywhere but in `folder`."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise UserError(f"{folder / MANIFEST} names {name!r}, which is no file of this checkpoint. Do not trust it.")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link that leads out of the checkpoint. Do not trust it.")
    return path


def _refuse_unlisted(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    for name in _names_in(folder):
        if name not in files and name != MANIFEST:
            raise UserError(f"{folder / name} is not listed in {MANIFEST}: it is none of the checkpoint's. Remove it.")


def _names_in(folder: Path) -> Iterator[str]:
    """Yield every file and link except hidden ones: nothing reads them, and some file systems create their own."""
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or path.is_file()) and not path.name.startswith("."):
            yield path.relative_to(folder).as_posix()
