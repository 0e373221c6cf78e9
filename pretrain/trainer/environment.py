"""The environment of a run: git revision, packages, interpreter."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from typing import Any

from pretrain.paths import REPOSITORY

RECORD = "snapshot.json"

_GIT_S = 20.0  # the time that git may take to answer


def version_of(package: str) -> str | None:
    """Return the installed version of a package. None if it was installed without metadata, or not at all."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> dict[str, Any]:
    """Return `git_revision` and `git_changed_files` of this code. For a snapshot they are those of its origin."""
    record = REPOSITORY / RECORD
    if record.is_file():
        stored = json.loads(record.read_bytes())
        return {key: stored[key] for key in ("git_revision", "git_changed_files")}
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain") or "").splitlines(),
    }


def installed_packages() -> dict[str, Any]:
    """Return the versions of Python, of the platform and of all installed packages."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


def _git(*arguments: str) -> str | None:
    """Return git's answer about this code. None outside a checkout, and if git is missing or does not answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, check=True, timeout=_GIT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
