"""Lists the files that paths, folders, globs and URLs name, in one fixed order; and those left out, with the reason.

A file is asked for by its own name, or by a glob that ends as it does ('src/**/*.py'). In a folder, and for a glob that
does not say which kind it means ('corpus/*'), licences, READMEs and the like are left out. So is code beside other
data, readable or not.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pretrain.credentials import credential_in
from pretrain.data.text import globs
from pretrain.data.text.kinds import READABLE, ending_of, is_about, is_other_data, kind_of
from pretrain.data.text.source_files import SourceFile, is_url, local_file, remote_file
from pretrain.errors import UserError

if TYPE_CHECKING:
    import fsspec

HIDDEN = "hidden"
ABOUT = "README, LICENSE and the like"
CODE = ".py (code beside other files; name it, like 'FOLDER/**/*.py', to read it)"
TWICE = "named more than once (read once)"
NO_FILE = "no regular file"
_SHOWN = 10  # endings and reasons

Found = tuple[SourceFile, bool]  # a file, and whether it is asked for


@dataclass(frozen=True)
class Listing:
    """The files that are read, and the counts of names left out, by their ending or the reason."""

    files: list[SourceFile]
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        many = "file" if len(self.files) == 1 else "files"
        read = _counts(Counter(ending_of(file.path) for file in self.files))
        left_out = f"{self.left_out.total():,}: {_counts(self.left_out)}" if self.left_out else "nothing"
        return f"reads {len(self.files):,} {many} ({read}); leaves out {left_out}"


def list_files(patterns: Sequence[str]) -> Listing:
    """List the files that the patterns name: in the patterns' order, sorted within each.

    Each file comes once, even if several names and links lead to it.

    Raises:
        UserError: A pattern gives no file, a link leads nowhere, or something may not be read.
    """
    files: dict[str, SourceFile] = {}
    passed: dict[str, str] = {}  # the reason for which each is left out
    others: Counter[str] = Counter()
    for pattern in patterns:
        pattern = pattern.removeprefix("file://")
        found = list(_remote_files(pattern, others) if is_url(pattern) else _local_files(pattern, others))
        found.sort(key=lambda one: (not one[1], one[0].path))  # of two ways to a file, the one that asks for it counts
        known = {_identity(file): (file, is_asked) for file, is_asked in reversed(found)}
        others[TWICE] += len({file.path for file, _ in found}) - len(known)
        chosen, reasons = _chosen(known)
        if not chosen:
            raise _nothing(pattern, [file for file, _ in found], reasons)
        others[TWICE] += len(chosen.keys() & files.keys())
        for identity, file in sorted(chosen.items(), key=lambda entry: entry[1].path):
            files.setdefault(identity, file)
        passed |= reasons
    left_out = others + Counter(reason for name, reason in passed.items() if name not in files)
    return Listing(list(files.values()), left_out)


def listed_files(urls: Sequence[str]) -> list[SourceFile]:
    """Return the files at `urls`, all in one storage that lists folders: one request per folder instead of per file."""
    import fsspec

    fs, _ = fsspec.url_to_fs(urls[0])
    paths = [fs._strip_protocol(url) for url in urls]
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    found = {info["name"]: info for folder in folders for info in fs.ls(folder, detail=True)}
    return [remote_file(url, found[path]) for url, path in zip(urls, paths, strict=True)]


def _identity(file: SourceFile) -> str:
    return file.path if file.is_remote else os.path.realpath(file.path)


def _chosen(found: dict[str, Found]) -> tuple[dict[str, SourceFile], dict[str, str]]:
    """Split the found files, by identity, into those that are read, and the reasons for those that are not."""
    chosen: dict[str, SourceFile] = {}
    code: dict[str, SourceFile] = {}
    reasons: dict[str, str] = {}
    for identity, (file, is_asked) in found.items():
        if file.kind is None:
            reasons[identity] = ending_of(file.path) or "no ending"
        elif is_asked:
            chosen[identity] = file
        elif is_about(file.path):
            reasons[identity] = ABOUT
        elif file.kind == ".py":
            code[identity] = file
        else:
            chosen[identity] = file
    if chosen or any(is_other_data(file.path) for file, _ in found.values()):
        return chosen, reasons | dict.fromkeys(code, CODE)
    return code, reasons


def _nothing(pattern: str, found: Sequence[SourceFile], reasons: dict[str, str]) -> UserError:
    unread = next((f"; {file.path} is of no kind that can be read" for file in found if file.kind is None), "")
    if not found:
        if os.path.exists(pattern) and not os.path.isdir(pattern):
            return UserError(
                f"--source '{pattern}' is a pipe or a device, and only files can be read from where an interrupted "
                "command stopped. Write its content to a file, and name that."
            )
        return UserError(f"--source '{pattern}' matches no file. Readable are {READABLE}.")
    return UserError(
        f"--source '{pattern}' gives no file to read, but {_counts(Counter(reasons.values()))}{unread}. Readable are "
        f"{READABLE}: convert the files, or name others; a README or licence is read if it is named itself."
    )


def _local_files(pattern: str, left_out: Counter[str]) -> Iterator[Found]:
    if os.path.lexists(pattern):
        paths = [(pattern, True)]
    else:
        paths = [(path, _asks_for(pattern, path)) for path in globs.expand(pattern)]
    for path, is_asked in paths:
        if os.path.isdir(path):
            inner_paths: Iterable[str] = globs.files_below(path, left_out, hidden=HIDDEN, again=TWICE)
            is_asked = False
        else:
            inner_paths = [path]
        for inner in inner_paths:
            if (file := _entry(inner)) is None:
                left_out[NO_FILE] += 1
            else:
                yield file, is_asked


def _entry(path: str) -> SourceFile | None:
    """Return the file at `path`, which is there; None for what is no file. UserError for a link that leads nowhere."""
    try:
        return local_file(path) if stat.S_ISREG(os.stat(path).st_mode) else None
    except OSError as error:
        globs.refuse_broken_link(path)
        raise UserError(f"cannot look at {path}: {error.strerror}. Make it readable, or name other files.") from error


def _remote_files(pattern: str, left_out: Counter[str]) -> list[Found]:
    """Return the files that the URL `pattern` names: itself, those below it, or those that its wildcards match."""
    import fsspec

    if fault := credential_in(pattern):
        raise UserError(f"--source {pattern}: {fault}.")
    try:
        fs, path = fsspec.url_to_fs(pattern)
        return [(_remote_entry(fs, name, info), asked) for name, info, asked in _remote_entries(fs, path, left_out)]
    except UserError:
        raise
    except FileNotFoundError as error:
        why = error.__cause__ or error  # behind it may be a server that does not answer
        raise UserError(f"--source '{pattern}' matches no file: {type(why).__name__}: {why}.") from error
    except Exception as error:  # each protocol's library raises its own, ImportError for one that is not installed
        raise UserError(
            f"cannot list --source '{pattern}': {type(error).__name__}: {error}. Check the address, the network and "
            "the credentials."
        ) from error


def _remote_entries(
    fs: fsspec.AbstractFileSystem, path: str, left_out: Counter[str]
) -> Iterator[tuple[str, dict, bool]]:
    """Yield (name, the storage's description, whether it is asked for) of each file."""
    if globs.has_wildcard(path.partition("?")[0]) and not fs.isfile(path):
        found = {
            name: info
            for name, info in fs.glob(path, detail=True).items()
            if _has_hidden(path) or not _has_hidden(name)
        }
        matched = {name: (info, _asks_for(path, name)) for name, info in found.items()}
    elif kind_of(path) is None and fs.isdir(path):  # asking a web server whether a file is a folder fetches it
        matched = {path: ({"type": "directory"}, True)}
    else:
        matched = {path: (fs.info(path), True)}
    for name, (info, is_asked) in matched.items():
        if info.get("type") != "directory":
            yield name, info, is_asked
            continue
        for inner, about in fs.find(name, detail=True).items():
            if _has_hidden(inner[len(name) :]):
                left_out[HIDDEN] += 1
            elif inner not in matched:
                yield inner, about, False


def _remote_entry(fs: fsspec.AbstractFileSystem, name: str, info: dict) -> SourceFile:
    if info.get("size") is None:  # a web server's list of links does not say
        info = fs.info(name) if kind_of(name) else info | {"size": 0}
    return remote_file(fs.unstrip_protocol(name), info)


def _has_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _asks_for(pattern: str, path: str) -> bool:
    """Return whether a glob says which kind of file it means, by ending as `path` does."""
    return kind_of(path) is not None and os.path.basename(pattern).lower().endswith(ending_of(path))


def _counts(counts: Counter[str]) -> str:
    """Return the counts like ".jsonl 3, .txt 1", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = [f"{name} {count:,}" for name, count in ordered[:_SHOWN]]
    if others := sum(count for _, count in ordered[_SHOWN:]):
        shown.append(f"others {others:,}")
    return ", ".join(shown)
