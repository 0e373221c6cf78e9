"""The files of a source: named by paths, folders, globs and URLs, each with its size, in one fixed order."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.credentials import credential_in
from pretrain.errors import UserError

PLAIN = (".txt", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TABLES = (".parquet", ".arrow")
ENDINGS = (*PLAIN, *LINES, *TABLES)
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://")
_WILDCARD = re.compile(r"[*\[]")


@dataclass(frozen=True)
class SourceFile:
    """One file: where it is (a path or an fsspec URL), its size in bytes, and what else changes with its content."""

    path: str
    bytes: int
    version: str | None = None

    @property
    def ending(self) -> str:
        return next(ending for ending in sorted(ENDINGS, key=len, reverse=True) if self.path.endswith(ending))

    @property
    def is_remote(self) -> bool:
        return is_url(self.path)

    def open(self) -> BinaryIO:
        if not self.is_remote:
            return open(self.path, "rb")
        from pretrain.data.text.remote import open_remote

        # Of a table, parts here and there are read; the rest would come for nothing.
        return open_remote(self.path, self.bytes, 1 << 16 if self.path.endswith(TABLES) else 1 << 23)


def is_url(name: str) -> bool:
    return _URL.match(name) is not None


def matching_files(patterns: Sequence[str]) -> list[SourceFile]:
    """The files that paths, folders, globs and URLs name: in the patterns' order, sorted within each.

    Each file comes once, whatever number of names and links lead to it.
    """
    files: dict[str, SourceFile] = {}
    for pattern in patterns:
        pattern = pattern.removeprefix("file://")
        found = remote_files(pattern) if is_url(pattern) else _local_files(pattern)
        if not found:
            raise UserError(f"--source '{pattern}' matches no file. Readable are {', '.join(ENDINGS)}.")
        for file in sorted(found, key=lambda file: file.path):
            files.setdefault(file.path if file.is_remote else os.path.realpath(file.path), file)
    for file in files.values():
        if not file.path.endswith(ENDINGS):
            raise UserError(
                f"{file.path} is of no kind that can be read: {', '.join(ENDINGS)}. Convert or leave out the file."
            )
    return list(files.values())


def local_file(path: str | Path) -> SourceFile:
    """The version is the time of the last change, since a file can change and keep its size."""
    status = os.stat(path)
    return SourceFile(str(path), status.st_size, str(status.st_mtime_ns))


def library_folder() -> Path:
    """Where the standard library of this Python lies."""
    return Path(sysconfig.get_path("stdlib"))


def remote_files(pattern: str) -> list[SourceFile]:
    """The files that the URL `pattern` names: itself, those below it, or those that its wildcards match."""
    import fsspec

    if fault := credential_in(pattern):
        raise UserError(f"--source {pattern}: {fault}.")
    try:
        fs, path = fsspec.url_to_fs(pattern)
        if _WILDCARD.search(path) and not fs.isfile(path):
            found = fs.glob(path, detail=True)
        elif not path.endswith(ENDINGS) and fs.isdir(path):  # asking a web server whether a file is a folder fetches it
            found = {name: info for name, info in fs.find(path, detail=True).items() if name.endswith(ENDINGS)}
        else:
            found = {path: fs.info(path)}
    except FileNotFoundError as error:
        why = error.__cause__ or error  # behind it may be a server that does not answer
        raise UserError(f"--source '{pattern}' matches no file: {type(why).__name__}: {why}.") from error
    except Exception as error:  # each protocol's library raises its own, ImportError for one that is not installed
        raise UserError(
            f"cannot list --source '{pattern}': {type(error).__name__}: {error}. Check the address, the network and "
            "the credentials."
        ) from error
    files = [(fs.unstrip_protocol(name), info) for name, info in found.items() if info.get("type") != "directory"]
    return [_remote_file(url, info) for url, info in files]


def listed_files(urls: Sequence[str]) -> list[SourceFile]:
    """The files at `urls`, all in one storage that lists folders: one request for each folder instead of each file."""
    import fsspec

    fs, _ = fsspec.url_to_fs(urls[0])
    paths = [fs._strip_protocol(url) for url in urls]
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    found = {info["name"]: info for folder in folders for info in fs.ls(folder, detail=True)}
    return [_remote_file(url, found[path]) for url, path in zip(urls, paths, strict=True)]


def share(files: Sequence[SourceFile], part: tuple[int, int]) -> list[SourceFile]:
    """Share `part` = (number, count) of `files`: contiguous, about equal in bytes, every file in exactly one share."""
    number, count = part
    total = sum(file.bytes for file in files)
    chosen, start = [], 0
    for file in files:
        middle = 2 * start + file.bytes
        if min(count * middle // max(2 * total, 1), count - 1) == number:
            chosen.append(file)
        start += file.bytes
    return chosen


def _local_files(pattern: str) -> list[SourceFile]:
    if Path(pattern).is_dir():
        found = [path for path in _below(Path(pattern)) if path.name.endswith(ENDINGS)]
    else:
        names = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        found = map(Path, names)
    return [local_file(path) for path in found if path.is_file()]


def _below(folder: Path) -> Iterator[Path]:
    """What lies in `folder` and below it, links followed, hidden names left out as globs do, each real folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}. Make it readable, or name other files.")

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        # Sorted, so that of two ways to a folder the same one is taken wherever the files lie.
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(parent, name) for name in names if not name.startswith("."))
        seen.add(real)


def _remote_file(url: str, info: dict) -> SourceFile:
    if info.get("size") is None:
        raise UserError(f"the server does not say how large {url} is, which reading it needs. Download it first.")
    return SourceFile(url, int(info["size"]), _version(info))


def _version(info: dict) -> str | None:
    """What changes with the content, where the storage has such a thing."""
    version = next((info[key] for key in ("ETag", "etag", "blob_id", "md5Hash") if info.get(key)), None)
    return None if version is None else str(version)
