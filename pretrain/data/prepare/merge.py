"""Joins the parts of an array job into one preparation: by renaming their shards, or by shuffling their documents.

The renames are recorded before the first file moves, so that a merge killed at any moment can continue. The manifests
come last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.data.json_files import read_json
from pretrain.data.prepare.journal import Journal, splits_of
from pretrain.data.prepare.output_folder import JOURNAL, refuse_unrecorded_files, remove, writing_in
from pretrain.data.prepare.parts import PARTS, complete_parts, joined_manifest, part_folder
from pretrain.data.prepare.shuffle import shuffle
from pretrain.data.progress import Progress
from pretrain.data.tokens.manifest import DTYPES, MANIFEST, write_manifest
from pretrain.data.tokens.shards import TokenShards, open_shards
from pretrain.errors import UserError
from pretrain.files import sync_folder


def merge(out: Path, *, workers: int, shuffle_seed: int | None = None) -> dict[str, TokenShards]:
    """Join the parts in `out` to out/train and so on, in the order of the source.

    A merge that was killed continues; one that is done returns at once.

    Args:
        out: The folder of the preparation.
        workers: The number of threads that check or shuffle.
        shuffle_seed: Shuffle the documents across all parts with this seed; None: keep their order.

    Returns:
        The corpus of each split.

    Raises:
        UserError: Parts are missing, incomplete, made with other settings, or differ from their checksums; the message
            names them.
    """
    if not out.is_dir():
        raise UserError(f"there is no folder '{out}' with parts to join. Make them with --part.")
    with writing_in(out):
        settings = _settings(out, workers, moves=shuffle_seed is None)
        journal = Journal(out, settings if shuffle_seed is None else settings | {"shuffle": shuffle_seed})
        folders = [part_folder(out, (number, settings["parts"])) for number in range(settings["parts"])]
        if not journal.finished:
            if shuffle_seed is None:
                _join(folders, journal)
            else:
                shuffle(folders, journal, workers)
        _remove(folders, out / PARTS)
        return {split: open_shards(out / split, verify="size") for split in splits_of(settings)}


def _settings(out: Path, workers: int, *, moves: bool) -> dict:
    """Return the settings of the whole: from the journal of a merge that has begun, or from the parts after checking them."""
    if not (out / JOURNAL).exists():
        folders, settings = complete_parts(out)
        refuse_unrecorded_files(out, PARTS)
        shards = [folder / split for folder in folders for split in splits_of(settings)]
        if moves:
            _refuse_other_file_systems(out, shards)
        _verify(shards, workers)
        return settings | {"parts": len(folders)}
    settings = read_json(out / JOURNAL)["settings"]
    if "parts" not in settings:
        raise UserError(f"'{out}' holds a preparation that was not made in parts, so there is nothing to join.")
    return {key: value for key, value in settings.items() if key != "shuffle"}


def _refuse_other_file_systems(out: Path, folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.stat().st_dev != out.stat().st_dev:
            raise UserError(
                f"{folder} lies on another file system than '{out}', so its shards cannot be renamed. Nothing was "
                "changed; move the parts to that of --out, or join them with --shuffle, which writes new shards."
            )


def _verify(folders: Sequence[Path], workers: int) -> None:
    shards = [open_shards(folder, verify="size") for folder in folders]
    progress = Progress("verified", sum(held.tokens * held.dtype.itemsize for held in shards))
    size_bytes = documents = tokens = 0
    with ThreadPoolExecutor(workers) as pool:
        for held in pool.map(open_shards, folders):
            size_bytes += held.tokens * held.dtype.itemsize
            documents += held.documents
            tokens += held.tokens
            progress.update((size_bytes, documents, tokens))
    progress.close()
    if not any(held.tokens for folder, held in zip(folders, shards, strict=True) if folder.name == "train"):
        raise UserError(
            "the parts hold no text for train, so there is nothing to join. Delete them and make them again, with more "
            "documents or less for val and held_out."
        )


def _join(folders: Sequence[Path], journal: Journal) -> None:
    if not journal.state:
        journal.state |= {split: _plan(folders, split) for split in splits_of(journal.settings)}
        journal.commit()
    for split, plan in journal.state.items():
        (journal.out / split).mkdir(exist_ok=True)
        for old, new in plan["moves"]:
            _move(journal.out / old, journal.out / split / new)
        sync_folder(journal.out / split)
    for split, plan in journal.state.items():
        write_manifest(journal.out / split, DTYPES[plan["dtype"]], plan["shards"], plan["description"])
    journal.finish()


def _plan(folders: Sequence[Path], split: str) -> dict:
    """Return the renames that make the shards of `split`, and the content of its manifest, JSON."""
    manifests = [read_json(folder / split / MANIFEST) for folder in folders]
    homes = [folder for folder, manifest in zip(folders, manifests, strict=True) for _ in manifest["shards"]]
    shards, description = joined_manifest(folders, split)
    moves = []
    for number, (home, shard) in enumerate(zip(homes, shards, strict=True)):
        for key, ending in (("file", "bin"), ("ends_file", "ends")):
            name = f"shard_{number:05d}.{ending}"
            moves.append([f"{PARTS}/{home.name}/{split}/{shard[key]}", name])
            shard[key] = name
    return {"moves": moves, "dtype": manifests[0]["dtype"], "shards": shards, "description": description}


def _remove(folders: Sequence[Path], parts: Path) -> None:
    """Remove the parts, and the folder that they are in unless it holds anything else."""
    for folder in folders:
        remove(folder)
    try:
        parts.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"all parts are joined; '{parts}' is left as it is: {error.strerror}", file=sys.stderr)


def _move(old: Path, new: Path) -> None:
    if old.exists():
        os.replace(old, new)
    elif not new.exists():
        raise UserError(f"{old} is missing, though the merge found it before. Restore it and run the merge again.")
