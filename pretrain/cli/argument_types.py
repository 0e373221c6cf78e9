"""Types of command-line arguments for argparse: paths as in run files, and numbers that must be finite."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path

from pretrain import paths

_LARGEST_INTEGER = 2**63 - 1


def path(text: str) -> Path:
    """Return a file or folder, with $VAR and ~ filled in: in a script they may be quoted, so no shell has done it."""
    return Path(_filled_in(paths.local, text))


def location(text: str) -> str:
    """Return a path (as by `path`), a pattern of paths, or a URL."""
    return _filled_in(paths.expanded, text)


def whole(least: float = -inf) -> Callable[[str], int]:
    """Return the type of whole numbers from `least` on, which may be written 1e9 or 1_000."""

    def parse(text: str) -> int:
        value = _finite(text)
        if not value.is_integer() or abs(value) > _LARGEST_INTEGER:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number")
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is too small: give at least {least}")
        return int(value) if "e" in text.lower() or "." in text else int(text)

    return parse


def number(*, above: float = -inf, least: float = -inf) -> Callable[[str], float]:
    """Return the type of finite numbers that are more than `above` and at least `least`."""

    def parse(text: str) -> float:
        value = _finite(text)
        if value <= above or value < least:
            bound = f"more than {above:g}" if value <= above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"'{text}' is too small: give {bound}")
        return value

    return parse


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = inf
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def _filled_in(fill_in: Callable[[str], str], text: str) -> str:
    try:
        return fill_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}") from error
