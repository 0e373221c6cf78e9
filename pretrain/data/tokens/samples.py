"""Folders of samples: a JSON index that lists files, each of which says where its samples begin.

MosaicML's MDS and Lightning's litdata lay their data sets out so. A sample is a document in some of them, and a fixed number
of tokens cut from the stream of documents in others. The files do not say which. So an import ends documents at separators
if the files have any, and else at the ends of samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError

_INDEX = "index.json"


def index_of(location: Path) -> Path:
    """Return the index of the data set at `location`, which is its folder or the index itself."""
    return location if location.name == _INDEX else location / _INDEX


def lists_samples(location: Path, key: str) -> bool:
    """Return whether an index lies at `location` that lists its files under `key`."""
    index = index_of(location)
    return index.is_file() and key in content_of(index)


def content_of(index: Path) -> dict[str, Any]:
    """Return what an index holds. UserError if it cannot be read or is no mapping."""
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {index}: {error}. Name the folder that has it, and restore it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{index} is not the index of a data set: it holds no mapping.")
    return content


def entries_of(index: Path, key: str) -> list[dict[str, Any]]:
    """Return what an index lists under `key`. UserError if that is no list of mappings."""
    entries = content_of(index).get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{index} has no list '{key}', so it is an index of another kind.")
    return entries


def listed_file(index: Path, name: object) -> Path:
    """Return the file of samples that an index names. UserError if it is missing, or not in the folder of the index."""
    path = index.parent / str(name)
    if not path.resolve().is_relative_to(index.parent.resolve()):
        raise UserError(f"{index} names the file {name!r}, which lies outside of its folder.")
    if not path.is_file():
        raise UserError(f"{path} is missing, and {index} names it. Restore it.")
    return path


def sample_offsets(path: Path, samples: object, size_bytes: object) -> np.ndarray:
    """Return where the samples of a file begin and the last one ends, in bytes from its start.

    Args:
        path: the file: the number of samples, these places (uint32 each), and what the samples hold.
        samples: the number of samples by the index.
        size_bytes: the size of the file by the index.

    Returns:
        (samples + 1,) int64.

    Raises:
        UserError: the file is not as the index says, or is corrupt.
    """
    found = path.stat().st_size
    if found != size_bytes:
        raise UserError(f"{path} has {found} bytes and its index says {size_bytes}. It was cut or changed: restore it.")
    head = np.fromfile(path, "<u4", count=1)
    offsets = np.fromfile(path, "<u4", count=int(head[0]) + 1, offset=4).astype(np.int64) if len(head) else head
    if len(head) == 0 or int(head[0]) != samples or len(offsets) != int(head[0]) + 1:
        raise UserError(f"{path} has another number of samples than the {samples} of its index: restore it.")
    if np.diff(offsets).min(initial=0) < 0 or offsets[-1] > found or offsets[0] < 4 + 4 * len(offsets):
        raise UserError(f"{path} is corrupt: the places of its samples are not in order, or lie outside of the file.")
    return offsets
