"""Expands globs and folders of this machine without losing anything in silence.

`glob` passes over folders that may not be listed and links that lead nowhere, and can go round in circles. Here the
first two are errors, and each real folder below a name is entered once.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator

from pretrain.errors import UserError

_WILDCARD = re.compile(r"[*?[]")


def has_wildcard(path: str) -> bool:
    return _WILDCARD.search(path) is not None


def expand(pattern: str) -> Iterator[str]:
    """Yield the paths that match: `*`, `?` and `[]` within a name, `**` for any folders; hidden names only if named."""
    parts = [part for part in pattern.split("/") if part]
    if parts[-2:] == ["**", "*"]:
        parts.pop()  # the folders stand for all that is in them
    return _expand("/" if pattern.startswith("/") else "", parts)


def files_below(folder: str, left_out: Counter, *, hidden: str, again: str) -> Iterator[str]:
    """Yield the paths in `folder` and below it; links are followed, and each real folder is entered once.

    Hidden names, and folders that were entered before, are counted in `left_out` under the names given here.
    """
    for parent, names in _walk(folder, left_out, hidden, again):
        yield from (os.path.join(parent, name) for name in names)


def refuse_broken_link(path: str) -> None:
    """Raise UserError if `path` is a link that leads nowhere."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which is not there or leads round in a circle. Restore what it "
            "links to, or remove the link."
        )


def _expand(prefix: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield prefix
        return
    head, *rest = parts
    if head == "**":
        for folder, names in _walk(prefix, Counter(), "", "") if rest else ():
            for name in names:
                if not os.path.splitext(name)[1][1:].isalpha():  # it may lead to a folder, like `v1.0`
                    refuse_broken_link(os.path.join(folder, name))
            yield from _expand(folder, rest)
        if not rest:
            yield prefix or "."
        return
    for name in _names(prefix, head) if has_wildcard(head) else [head]:
        path = os.path.join(prefix, name)
        if rest and os.path.isdir(path):
            yield from _expand(path, rest)
        elif rest:
            refuse_broken_link(path)
        elif os.path.lexists(path):
            yield path


def _names(folder: str, pattern: str) -> list[str]:
    matches = re.compile(fnmatch.translate(pattern)).match
    try:
        names = os.listdir(folder or ".")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _cannot_list(error) from error
    return sorted(name for name in names if matches(name) and (pattern.startswith(".") or not name.startswith(".")))


def _walk(top: str, left_out: Counter, hidden: str, again: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, the names of the files in it) for `top` and the folders below it."""

    def refuse(error: OSError) -> None:
        raise _cannot_list(error) from error

    seen: set[str] = set()
    for parent, folders, names in os.walk(top or ".", onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            left_out[again] += 1
            folders[:] = []
            continue
        seen.add(real)
        left_out[hidden] += sum(name.startswith(".") for name in (*folders, *names))
        # Sorted, so that of two ways to a folder the same one is taken wherever the files lie.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent if top else os.path.normpath(parent), [name for name in names if not name.startswith(".")]


def _cannot_list(error: OSError) -> UserError:
    return UserError(f"cannot list {error.filename}: {error.strerror}. Make it readable, or name other files.")
