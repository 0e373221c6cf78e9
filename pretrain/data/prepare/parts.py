"""Parts: shares of one preparation that tasks of an array job make side by side, each in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from pretrain.data.json_files import read_json
from pretrain.data.prepare.output_folder import JOURNAL, refuse_unrecorded_files, writing_in
from pretrain.data.tokens.manifest import MANIFEST
from pretrain.errors import UserError

PARTS = "parts"
_OF_THE_WRITER = {"schema_version", "dtype", "tokens", "documents", "shards"}  # the writer derives them from the shards
_NAME = re.compile(r"part_(\d+)_of_(\d+)")


def part_folder(out: Path, part: tuple[int, int]) -> Path:
    """Return the folder of part `part` = (number, count) of the preparation `out`."""
    number, count = part
    return out / PARTS / f"part_{number:04d}_of_{count:04d}"


@contextmanager
def writing_part(out: Path, part: tuple[int, int]) -> Iterator[Path]:
    """Yield the folder of `part` for this process alone; others may have those of other parts."""
    folder = part_folder(out, part)
    _refuse_whole(out)
    _refuse_other_count(out, part[1])
    refuse_unrecorded_files(out, PARTS)
    refuse_unrecorded_files(folder)
    with writing_in(out, shared=True), writing_in(folder):
        _refuse_whole(out)  # a merge may have ended since
        yield folder


def refuse_parts(out: Path) -> None:
    """Raise UserError if `out` holds the parts of an array job."""
    if (out / PARTS).is_dir() and not (out / JOURNAL).exists():
        raise UserError(
            f"'{out}' holds parts of a preparation ({_listed(_found(out))}). Join them with --merge --out {out}, make "
            "the missing ones with --part, or give another --out."
        )


def complete_parts(out: Path) -> tuple[list[Path], dict]:
    """Return the folders of all parts in `out`, in order, and the settings that they share.

    Raises:
        UserError: A part is missing, incomplete, or made with other settings than the first.
    """
    found = _found(out)
    if not found:
        raise UserError(f"'{out}' holds no parts of a preparation, so there is nothing to join. Make them with --part.")
    count = found[0][1]
    _refuse_other_count(out, count)
    if missing := sorted({(number, count) for number in range(count)} - set(found)):
        raise UserError(f"'{out}' has no {_listed(missing)}. Run the same preparation with --part for each of them.")
    folders = [part_folder(out, part) for part in found]
    journals = [read_json(folder / JOURNAL) if (folder / JOURNAL).exists() else {} for folder in folders]
    if open_parts := [part for part, journal in zip(found, journals, strict=True) if not journal.get("finished")]:
        raise UserError(f"'{out}' has incomplete parts: {_listed(open_parts)}. Run the same command for each to go on.")
    settings = [_without_part(journal["settings"]) for journal in journals]
    for part, others in zip(found, settings, strict=True):
        if differing := sorted(
            key for key in settings[0].keys() | others.keys() if settings[0].get(key) != others.get(key)
        ):
            raise UserError(
                f"{_listed([part])} of '{out}' was made with another {', '.join(differing)} than {_listed(found[:1])}. "
                "Delete the folders of the wrong ones and make them again."
            )
    return folders, settings[0]


def joined_manifest(folders: Sequence[Path], split: str) -> tuple[list[dict], dict]:
    """Return the manifest's entries for the shards of `split` in all `folders`, in order, and its description of the whole."""
    manifests = [read_json(folder / split / MANIFEST) for folder in folders]
    description = {key: value for key, value in manifests[0].items() if key not in _OF_THE_WRITER} | {
        "text_bytes": sum(manifest["text_bytes"] for manifest in manifests),
        "sources": [source for manifest in manifests for source in manifest["sources"]],
        "unreadable": [place for manifest in manifests for place in manifest.get("unreadable", [])],
        "left_out": _sums([manifest.get("left_out", {}) for manifest in manifests]),
    }
    return [shard for manifest in manifests for shard in manifest["shards"]], description


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in counts) for name in dict.fromkeys(chain(*counts))}


def _refuse_whole(out: Path) -> None:
    if (out / JOURNAL).exists():
        merged = "parts" in read_json(out / JOURNAL)["settings"]
        what = "parts that are joined, or being joined" if merged else "a preparation that was not made in parts"
        raise UserError(f"'{out}' holds {what}. Nothing was changed; give another --out.")


def _refuse_other_count(out: Path, count: int) -> None:
    if others := [part for part in _found(out) if part[1] != count]:
        raise UserError(
            f"'{out}' holds parts of a preparation in another number of parts than {count} ({_listed(others)}). "
            "Use that number (an array of that many tasks), or give another --out."
        )


def _found(out: Path) -> list[tuple[int, int]]:
    """Return the (number, count) of the parts in `out`, in order."""
    if not (out / PARTS).is_dir():
        return []
    matches = [_NAME.fullmatch(folder.name) for folder in (out / PARTS).iterdir()]
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def _without_part(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "part"}


def _listed(parts: Sequence[tuple[int, int]]) -> str:
    names = [f"{number}/{count}" for number, count in parts[:10]]
    noun = "parts" if len(parts) > 1 else "part"
    more = " ..." if len(parts) > 10 else ""
    return f"{noun} {', '.join(names)}{more}"
