"""The environment of a run: git revision, packages, interpreter."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from typing import Any

from pretrain.paths import REPOSITORY

RECORD = "snapshot.json"


_GIT_S = 20.0  # that git may take to answer


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it was put there without saying."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> dict[str, Any]:
    """`git_revision` and `git_changed_files` of this very code: of a snapshot, those it was taken from."""
    record = REPOSITORY / RECORD
    if record.is_file():
        stored = json.loads(record.read_bytes())
        return {key: stored[key] for key in ("git_revision", "git_changed_files")}
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain") or "").splitlines(),
    }


def installed_packages() -> dict[str, Any]:
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


def _git(*arguments: str) -> str | None:
    """git's answer about this code, or None outside a checkout, and where git is not there or does not answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, check=True, timeout=_GIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
