"""The argument parser that all command lines begin with."""

from __future__ import annotations

import argparse

from pretrain import __version__


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--help`, which shows `description` (a module's docstring) line by line, and `--version`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"evenkeel {__version__}")
    return parser
