"""Expands $VAR, ${VAR} and ~ in the paths of run files and command lines, or refuses the path."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pretrain import startup

# Holds this package, and in a checkout tools, configurations and job scripts.
REPOSITORY = Path(__file__).resolve().parents[1]

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes; Linux allows 255 and 4,095, and files are made below the path
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+://")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(.*?)\})", re.ASCII)


def expanded(path: str) -> str:
    """Return `path` with $VAR, ${VAR} and a leading ~ or ~user filled in; a URL unchanged.

    Raises:
        ValueError: a variable is undefined or empty, or no file system can have such a path. The message is a sentence.
    """
    if _URL.match(path):
        return path
    path = _VARIABLE.sub(_variable, path)
    # A home that was made for libraries is deleted with its content at the end of this process.
    if startup.has_home() or path.split("/")[0] != "~":
        path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"{path.split('/')[0]} stands for a home folder, and there is none: write the path out")
    if not path:
        raise ValueError("is empty: give a path")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise ValueError("holds a control character")
    for name in path.split("/"):
        check_name(name)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"is longer than the {_LONGEST_PATH:,} bytes that file systems take")
    return path


def local(path: str) -> str:
    """Return `expanded(path)`. Raises ValueError for a URL, too."""
    path = expanded(path)
    if _URL.match(path):
        raise ValueError("is a URL; give a folder or file that this machine can open")
    return path


def check_name(name: str) -> str:
    """Return `name`. Raises ValueError if it is too long for a file."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ValueError(f"'{name[:20]}...' is longer than the {_LONGEST_NAME} bytes that file systems take")
    return name


def _variable(found: re.Match) -> str:
    name = found[1] or found[2]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{found[0]} is no variable: only $NAME and ${{NAME}} are filled in")
    missing = name not in os.environ or (name == "HOME" and not startup.has_home())
    if missing or not (value := os.environ[name]):
        state = "not set" if missing else "empty"
        raise ValueError(f"${name} is {state} here: set it, or write the path out")
    return value
