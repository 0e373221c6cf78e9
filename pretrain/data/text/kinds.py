"""Kinds of files by their names: how a file can be read, and whether it is text of a data set at all."""

from __future__ import annotations

import os
import re

PLAIN = (".txt", ".py")
LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
READABLE = f".txt {' '.join(LINES)} (each also with {' '.join(COMPRESSIONS)}), .py {' '.join(TABLES)}"
_COMPRESSED = (".txt", *LINES)
# Data that is not read, whole or compressed. Code beside it is likely to be what reads it.
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".lz4", ".zstd")
_OTHER_DATA = (
    *_ARCHIVES,
    ".csv",
    ".tsv",
    ".feather",
    ".avro",
    ".orc",
    ".warc",
    ".h5",
    ".hdf5",
    ".npy",
    ".npz",
    ".tfrecord",
)
# Files that describe a data set or a program, and are no part of it.
_ABOUT = re.compile(
    r"(readme|licen[cs]es?|copying|copyright|notices?|citation|changelog|contributing|code[ _-]of[ _-]conduct"
    r"|third[ _-]?party[ _-]?(licen[cs]es|notices)|(\w+[_-])?requirements)([ ._-].*)?\.(txt|py)"
    r"|(dataset_infos?|dataset_dict|state)\.json",
)


def kind_of(path: str) -> str | None:
    """Return the ending that decides how `path` is read, in lower case, without that of a compression; None if it is not."""
    name, compression = os.path.splitext(path.lower())
    if compression not in COMPRESSIONS:
        name, compression = path.lower(), ""
    kinds = _COMPRESSED if compression else (*PLAIN, *LINES, *TABLES)
    return next((kind for kind in kinds if name.endswith(kind)), None)


def compression_of(path: str) -> str:
    """Return the ending of a compression that `path` has, in lower case; empty without one."""
    ending = os.path.splitext(path.lower())[1]
    return ending if ending in COMPRESSIONS else ""


def ending_of(path: str) -> str:
    """Return the whole ending of `path` in lower case, like ".json.gz"; empty without one."""
    name, ending = os.path.splitext(os.path.basename(path.lower()))
    return os.path.splitext(name)[1] + ending if ending in COMPRESSIONS else ending


def is_other_data(path: str) -> bool:
    """Return whether `path` is named like data of a kind that is not read."""
    return kind_of(path) is None and (bool(compression_of(path)) or ending_of(path) in _OTHER_DATA)


def is_about(path: str) -> bool:
    """Return whether `path` is named like a licence, a README or a list of files, which a folder holds beside its text."""
    name = os.path.basename(path.lower()).removesuffix(compression_of(path))
    return _ABOUT.fullmatch(name) is not None
